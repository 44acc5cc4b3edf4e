"""Pages that travel by all-to-all: who sends which to whom, straight to each rank or once a domain of ranks."""

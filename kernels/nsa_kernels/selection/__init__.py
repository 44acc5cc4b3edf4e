"""Which blocks a query attends to: `select` is the face; `importance`, `hopper_importance`, `top` are its kernels."""

"""New tokens attend to a part of a paged cache, and parts are put together. START HERE: `attention`; a part: `part`."""

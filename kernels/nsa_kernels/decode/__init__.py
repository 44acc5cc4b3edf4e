"""New tokens of many sequences attend to a paged cache. START HERE: `attention`; `call` says what a cache is.

`append` writes what is new and stores compressed blocks; `compressed`, `candidates`, `chosen` and `merge` are the four
launches of the attention, in this order.
"""

"""New tokens of many sequences attend to a paged cache. START HERE: `attention`; a cache: `decode_contracts`.

`append` writes what is new and stores compressed blocks, which `phi` makes; `compressed`, `candidates`, `chosen` and
`merge` are the four launches of the attention, in this order.
"""

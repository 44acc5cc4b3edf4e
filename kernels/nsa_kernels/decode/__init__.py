"""New tokens of many sequences attend to a paged cache. START HERE: `attention`; a cache: `decode_contracts`.

`append` writes what is new and stores compressed blocks, which `phi` makes, turned by `turn`. The attention is three
launches: `first` (what `compressed` and `window` do, and the writing of new tokens), `second` (`candidates`, `merge`)
and `chosen`; `online` is the step of attention that they share.
"""

"""The reference of nsa_kernels: its functions as they are called, which contracts may decide when they are imported."""

import inspect

from docstrings import markdown

from nsa_kernels import reference

GROUPS = {
    "Compression": ("compress_mean", "compress_mlp", "compress_mlp_pair"),
    "Attention": ("compressed_attention", "window_attention", "select_blocks", "selected_attention"),
    "Gradients of attention": (
        "compressed_attention_backward", "window_attention_backward", "selected_attention_backward",
    ),
    "Gates and parts": ("combine", "gate_deltas", "sum_branches", "merge"),
}  # fmt: skip
WIDTH = 100


def functions() -> str:
    """Markdown: a heading, the signature and the docstring of each function."""
    assert sorted(sum(GROUPS.values(), ())) == sorted(reference.__all__), "GROUPS are not the public functions"
    parts = []
    for group, names in GROUPS.items():
        parts.append(f"## {group}")
        for name in names:
            function = getattr(reference, name)
            parts.append(f"### {name}\n\n```python\n{_call(name, inspect.signature(function))}\n```")
            parts.append(markdown(inspect.getdoc(function) or ""))
    return "\n\n".join(parts)


def _call(name: str, signature: inspect.Signature) -> str:
    """On one line, or with a line for each parameter."""
    line = f"{name}{signature}".replace("torch.", "")
    if len(line) <= WIDTH:
        return line
    parameters = [str(parameter).replace("torch.", "") for parameter in signature.parameters.values()]
    keywords = [parameter.kind is parameter.KEYWORD_ONLY for parameter in signature.parameters.values()]
    if True in keywords:
        parameters.insert(keywords.index(True), "*")
    returned = line.rpartition(" -> ")[2]
    return f"{name}(\n    " + ",\n    ".join(parameters) + f",\n) -> {returned}"

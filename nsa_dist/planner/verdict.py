"""The plan in words, every sentence computed from its numbers."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from nsa_dist.planner.core.strategies import GIB, Strategy, domain_size, head_groups
from nsa_dist.planner.core.time import ranks_per_node
from nsa_dist.planner.knobs import turn_knobs
from nsa_dist.planner.sweep import Candidate, Plan, make_plan
from nsa_dist.planner.timing import step_time

_TIGHT = 0.9  # of the GPU's memory: above this the plan names what would make room
_MATTERS = 0.02  # of a step: less than this no choice of how K/V travel is worth making for time

# What the planner does not know, said with every plan.
CAVEATS = (
    "No line of this plan was measured by running this configuration. Bytes on the wire and FLOPs are exact counts. "
    "Weights, optimizer and saved tensors are listed one by one, and tests hold them to a model that is built. The "
    "peak of one attention layer is within 10% of 18 measured ones, one rank of 1 to 8 on one H200; the rest of the "
    "transient memory and all seconds are a model.",
    "Seconds are bytes and FLOPs over one achieved rate each, added up; nothing is overlapped unless --overlap says "
    "so. Every constant carries its source; `assumed` ones were never measured.",
    "u, the share of the remote blocks a rank's queries choose together, is an input. It depends on how alike "
    "neighbouring queries choose, hardly on length: models at random initialisation choose nearly all they can see up "
    "to 64 ranks (0.75 over all ranks in zigzag order, 1 on the busiest). Take a smaller u only after seeing it in a "
    "run's metrics.",
    "`raw all-gather` is three K/V pairs gathered naively: those of every branch go to every rank, which compresses "
    "all of it. `shared all-gather` is another model, nsa.shared_kv=true: one pair for all branches, gathered one kv "
    "head at a time. The others move only the selected branch's K/V and share our halos and compressed keys.",
    "One layer measured over 4 H200s with the links of h200-8.yaml: forward and backward are within 7% of this model "
    "at head dims 128/128 from 512k tokens on. A fetch at 128k tokens took up to 1.5 times as long forward. At 192/128 "
    "a layer took 1.6 to 2.3 times as long, as the rates are those of kernels at 128/128.",
)


def verdict(plan: Plan) -> list[str]:
    """What to do and why, most important first."""
    parts = (_size(plan), _room(plan), _experts(plan), _layout(plan), _groups(plan), _wire(plan), _precision(plan))
    return [sentence for part in parts for sentence in part]


def summary(plan: Plan) -> list[str]:
    """The verdict in three lines: whether it fits, which context-parallel size, what a step of it takes."""
    return [_fits(plan), _choice(plan), _takes(plan)]


def break_even(plan: Plan, candidate: Candidate, how: str) -> float:
    """The largest u at which fetching is as quick as the strategy `how`; 0 if it never is."""
    other_s = candidate.outcome(how).time.total_s

    def slower(u: float) -> bool:
        time = step_time(
            candidate.shape,
            Strategy("fetch", u),
            plan.options,
            plan.cluster,
            candidate.replicas,
            candidate.micro_batches,
        )
        return time.total_s > other_s

    if slower(0.0):
        return 0.0
    low, high = 0.0, 1.0
    if not slower(high):
        return high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if slower(middle) else (middle, high)
    return low


def _groups(plan: Plan) -> list[str]:
    """In how many groups the kv heads will travel."""
    best = plan.best
    if best is None or best.cp_size == 1:
        return []
    count, asked = head_groups(best.shape.core, plan.options), plan.options.fetch.head_groups
    why = "as configured" if asked else "by sizes and measured constants; calls in line take one"
    return [f"Kv heads travel in {count} group{'s' * (count > 1)} at cp {best.cp_size}, {why}."]


def _fits(plan: Plan) -> str:
    memory, best, size = plan.cluster.gpu_memory_bytes.value, plan.best, plan.config.parallel.context_parallel_size
    if best is None:
        least = _least(plan)
        return (
            f"Does not fit {plan.cluster.name}: of cp {_sizes(plan.candidates)} the least is cp {least.cp_size}, which "
            f"takes {_gib(least.judged.total_bytes)} of a GPU's {_gib(memory)}, most of it is {_fullest(least)}."
        )
    configured = next((c for c in plan.candidates if c.cp_size == size), None)
    if configured is None:
        room = f"{_gib(best.judged.total_bytes)} of a GPU's {_gib(memory)}"
        return (
            f"Fits {plan.cluster.name}, with cp {best.cp_size}: {room}. The configuration's cp {size} was not planned."
        )
    taken = f"cp {size} takes {_gib(configured.judged.total_bytes)} of a GPU's {_gib(memory)}"
    if configured.fits(plan.cluster):
        return f"Fits {plan.cluster.name}, as configured: {taken}."
    return (
        f"Does not fit {plan.cluster.name}, as configured: {taken}, most of it is {_fullest(configured)}; with cp "
        f"{best.cp_size} it fits."
    )


def _choice(plan: Plan) -> str:
    best, size = plan.best, plan.config.parallel.context_parallel_size
    if best is None:
        other = make_plan(plan.config, plan.cluster, plan.options).best
        if other is not None:
            return f"Take parallel.context_parallel_size={other.cp_size}, which was not planned: it fits."
        # The quickest change first, but one that leaves the sequence as long as it is wished before one that does not.
        fitting = sorted((k for k in turn_knobs(plan) if k.fits), key=lambda k: "sequence_length" in k.words)
        if not fitting:
            return "Take more GPUs, a shorter sequence or a smaller model: no single change is enough."
        size = fitting[0].candidate.cp_size
        return f"Take {fitting[0].words} parallel.context_parallel_size={size}: then it fits."
    own = "as configured" if best.cp_size == size else f"instead of {size}"
    sizes = _sizes(plan.fitting)
    why = "the only size that fits" if len(plan.fitting) == 1 else f"of the sizes that fit ({sizes}) the quickest"
    idle = f"; {best.idle_gpus} of {plan.cluster.num_gpus} GPUs stay idle" if best.idle_gpus else ""
    return f"Take parallel.context_parallel_size={best.cp_size}, {own}: {why}{idle}."


def _takes(plan: Plan) -> str:
    shown = plan.best or _least(plan)
    judged, memory = shown.judged, plan.cluster.gpu_memory_bytes.value
    wire_s = sum(judged.time.wire_s.values())
    rates = "" if plan.config.run.dtype == "bf16" else ", at rates of bf16 and not of this run's fp32"
    return (
        f"A step at cp {shown.cp_size} takes {_seconds(judged.time.total_s)} by the model, {_seconds(wire_s)} of it on "
        f"the wire{rates}; the fullest GPU holds {_gib(judged.total_bytes)} of {_gib(memory)}."
    )


def _sizes(candidates: Iterable[Candidate]) -> str:
    return ", ".join(str(c.cp_size) for c in candidates)


def _least(plan: Plan) -> Candidate:
    return min(plan.candidates, key=lambda c: c.judged.total_bytes)


def _fullest(candidate: Candidate) -> str:
    """The kind of memory that takes most."""
    kinds = candidate.judged.memory_bytes
    kind = max(kinds, key=lambda name: kinds[name])
    return f"{kind}, {_gib(kinds[kind])}"


def _size(plan: Plan) -> Iterator[str]:
    memory = plan.cluster.gpu_memory_bytes.value
    best = plan.best
    if best is None:
        least = _least(plan)
        yield (
            f"Nothing fits: the least is {_gib(least.judged.total_bytes)} at cp {least.cp_size}, and a GPU has "
            f"{_gib(memory)}."
        )
        return
    idle = f"; {best.idle_gpus} GPUs stay idle, as global_batch_size feeds no more replicas" if best.idle_gpus else ""
    replicas = f" in each of {best.replicas} replicas" if best.replicas > 1 else ""
    yield (
        f"Take cp {best.cp_size}{replicas}: of the sizes that fit it has the shortest step, "
        f"{_seconds(best.judged.time.total_s)}, with {_gib(best.judged.total_bytes)} of {_gib(memory)} used{idle}."
    )
    if best.cp_size != plan.config.parallel.context_parallel_size:
        yield f"The configuration says cp {plan.config.parallel.context_parallel_size}."


def _room(plan: Plan) -> Iterator[str]:
    """What is full, and what would empty it."""
    memory = plan.cluster.gpu_memory_bytes.value
    failing = [c for c in plan.candidates if not c.fits(plan.cluster)]
    if failing:
        parts = ", ".join(f"cp {c.cp_size} ({_gib(c.judged.total_bytes)})" for c in failing)
        last = failing[-1]
        yield f"Too large for a GPU: {parts}; most of it is {_fullest(last)} at cp {last.cp_size}."
    best = plan.best
    if best is not None and best.judged.total_bytes < _TIGHT * memory:
        return
    knobs = turn_knobs(plan)
    for knob in knobs[:4]:
        fits = "fits" if knob.fits else "still does not fit"
        yield (
            f"To make room: {knob.words} {fits} with {_gib(knob.candidate.judged.total_bytes)} at cp "
            f"{knob.candidate.cp_size}, {_seconds(knob.candidate.judged.time.total_s)} a step."
        )
    if not any(knob.fits for knob in knobs):
        yield "No single change is enough: use more GPUs, a shorter sequence or a smaller model."


def _experts(plan: Plan) -> Iterator[str]:
    """What every rank holds of them, and how their time is counted."""
    shape, model = (plan.best or _least(plan)).shape, plan.config.model
    held = [mlp for stage in range(shape.num_stages) for mlp in shape.mlps(stage) if mlp.num_experts]
    if not held:
        return
    all_of_them, active = (sum(getattr(mlp, name) for mlp in held) for name in ("parameters", "active_parameters"))
    cut = f", 1/{shape.tensor_size} of each" if shape.tensor_size > 1 else ""
    layers = model.num_layers + model.num_mtp_layers
    yield (
        f"Experts: {len(held)} of {layers} layers, {held[0].num_experts} each{cut}, all on "
        f"every rank of a stage; with routers {all_of_them / 1e9:.2f}B parameters, {active / 1e9:.2f}B of them for a "
        f"token. Their time is that of large products, in a loop over experts that are taken evenly: it takes longer."
    )


def _layout(plan: Plan) -> Iterator[str]:
    shown = plan.best or plan.candidates[-1]
    if shown.cp_size == 1:
        return
    other = next(name for name in shown.imbalance if name != shown.layout)
    yield (
        f"Layout {shown.layout}: its busiest rank attends {shown.imbalance[shown.layout]:.2f} times the mean number of "
        f"keys; with {other} it would be {shown.imbalance[other]:.2f} times."
    )


def _wire(plan: Plan) -> Iterator[str]:
    """When fetching pays."""
    shown = plan.best or plan.candidates[-1]
    if shown.cp_size == 1:
        yield "With one rank nothing travels, so there is nothing to fetch."
        return
    judged, gather = shown.judged, shown.outcome("all-gather")
    total_s, wire_s = judged.time.total_s, sum(judged.time.wire_s.values())
    yield (
        f"The wire takes {_seconds(wire_s)} of {_seconds(total_s)} at cp {shown.cp_size} with {judged.strategy.name} "
        f"({100 * wire_s / total_s:.1f}%)."
    )
    yield from _fetch_time(plan, shown)
    yield from _between_nodes(plan, shown)
    held, gathered = judged.held_bytes, gather.held_bytes
    bound = "" if held <= gathered else ". parallel.kv_fetch_budget_bytes bounds it, at the price of rounds"
    yield (
        f"Remote K/V held at once: {_gib(held)} with {judged.strategy.name}; an all-gather holds {_gib(gathered)} one "
        f"head at a time, {_gib(_whole(shown))} otherwise{bound}."
    )


def _between_nodes(plan: Plan, shown: Candidate) -> Iterator[str]:
    """What domains would save where a group spans nodes."""
    near, core = ranks_per_node(shown.shape.core, plan.cluster), shown.shape.core
    if near == shown.cp_size:
        return
    if domain_size(core, plan.options) > 1:
        yield (
            f"The group spans nodes, in domains of {domain_size(core, plan.options)} ranks: a page enters each domain "
            f"once, as a gathered shard does a node, and is passed on inside."
        )
        return
    yield (
        "The group spans nodes: a fetched page crosses the slow link once for every rank that wants it, a gathered "
        "shard once a node. That is why a small u matters here, and why a group inside one node is better."
    )
    fetch = plan.options.fetch
    if near == 1 or shown.cp_size % near or fetch.whole_shard_fraction < 1 or fetch.transport == "one_sided":
        return
    options = replace(plan.options, fetch=replace(fetch, domain_size=near))
    time = step_time(
        shown.shape, shown.judged.strategy, options, plan.cluster, shown.replicas, shown.micro_batches
    )  # fmt: skip
    yield (
        f"With parallel.domain_size={near} a page enters a node once and is passed on inside: a step would take "
        f"{_seconds(time.total_s)} instead of {_seconds(shown.judged.time.total_s)}, if ranks choose independently of "
        f"each other; the more alike they choose, the less crosses."
    )


def _fetch_time(plan: Plan, shown: Candidate) -> Iterator[str]:
    gather = shown.outcome("all-gather")
    fetches = [o for o in shown.outcomes if o.strategy.how == "fetch"]
    quickest = min(fetches, key=lambda o: o.time.total_s)
    even = break_even(plan, shown, "all-gather")
    gain_s = gather.time.total_s - quickest.time.total_s
    share = gain_s / gather.time.total_s
    if even == 0:
        yield "In time fetching never beats an all-gather of the selected branch's K/V here."
    elif even == 1:
        yield "In time fetching beats an all-gather of the selected branch's K/V here at any u."
    else:
        yield f"In time fetching beats an all-gather of the selected branch's K/V here only while u < {even:.2f}."
    if share < _MATTERS:
        yield (
            f"Either way it hardly matters on this cluster: {quickest.strategy.name} saves {_seconds(gain_s)} a step "
            f"({100 * share:.1f}%). Fetch for the memory bound, not for speed."
        )
    else:
        yield f"At {quickest.strategy.name} it saves {_seconds(gain_s)} a step ({100 * share:.1f}%)."


def _precision(plan: Plan) -> Iterator[str]:
    if plan.config.run.dtype != "bf16":
        yield (
            "run.dtype=fp32, but the cluster's rates are for bf16: read the bytes and the memory of this plan, not its "
            "seconds."
        )


def _whole(candidate: Candidate) -> int:
    """Raw K/V and its gradients of all heads of the selected branch, one layer, all on one rank."""
    heads, plan = candidate.shape.heads, candidate.shape.plan
    both = heads.element_bytes + heads.grad_bytes
    return plan.cp_size * plan.tokens_per_rank * heads.row_elements * both


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"

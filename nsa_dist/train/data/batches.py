"""The corpus of a run on every process, and the samples of a step cut for one rank."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nsa_dist.cp.device import put_on
from nsa_dist.cp.plan import ShardPlan
from nsa_dist.train.config import TrainConfig
from nsa_dist.train.data.blend import Blend
from nsa_dist.train.data.corpus import SPLITS, check_length
from nsa_dist.train.data.packing import write_corpus
from nsa_dist.train.data.packs import Pack, Packer, joined
from nsa_dist.train.data.samples import Samples, SampleSource, split_documents
from nsa_dist.train.files.output import OutputDir
from nsa_dist.train.mtp import labels as mtp_labels
from nsa_dist.train.refused import Refused
from nsa_dist.train.tasks.source import training_samples
from nsa_dist.train.tokens import listing, sets
from nsa_dist.train.world import World


@dataclass(frozen=True)
class Batch:
    """One rank's part of a micro-batch: [micro_batch_size, T] each, or one row [1, T] where it is a pack."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    mtp_labels: Tensor | None = None  # [..., depths], of the tokens behind the next one
    mtp_loss_mask: Tensor | None = None
    pack: Pack | None = None

    @property
    def packed_seq_params(self) -> PackedSeqParams | None:
        return None if self.pack is None else self.pack.params


@dataclass(frozen=True)
class HostBatch:
    """What the host alone makes of a `Batch`: the tensors by name, on the CPU."""

    parts: dict[str, Tensor]
    bounds: tuple[int, ...] | None = None  # of the documents, where it is a pack
    planned: Pack | None = None  # None: `_placed` sees to it


@dataclass(frozen=True)
class Datasets:
    """The samples of one run: of `sequence_length` consecutive tokens of shuffled files, and of tasks for training."""

    train: SampleSource
    validation: SampleSource


def build_datasets(config: TrainConfig, output: OutputDir, world: World) -> Datasets:
    """Read `output.data`; process 0 packs the corpus there first if it is not there yet. Called on every process.

    Training samples of `data.tasks` come in between those of text, by their shares; validation is on text alone.

    Of a run on token sets these are read where they are. Refused on all processes if there is less than a sequence to
    train on, or something else than what the run was begun with.
    """
    if config.data.token_sets:
        world.agreed(lambda: _note_sets(config, output))
        return _of_sets(config)
    world.agreed(lambda: _pack(config, output))
    train, validation = (
        Samples(_opened(output.data / split), config.run.sequence_length, config.run.seed, packed=config.data.is_packed)
        for split in SPLITS
    )
    check_length(train.num_tokens, config.run.sequence_length)
    return Datasets(_with_tasks(train, config), validation)


def _with_tasks(texts: SampleSource, config: TrainConfig) -> SampleSource:
    tasks = training_samples(config)
    of_texts = [(1 - sum(Fraction(str(share)) for share, _ in tasks), texts)]
    if not tasks:
        return texts
    mixed = [(weight, source) for weight, source in [*of_texts, *tasks] if weight]
    return Blend([source for _, source in mixed], [float(weight) for weight, _ in mixed])


def _note_sets(config: TrainConfig, output: OutputDir) -> None:
    """The run's marker has their digest from now on; the index, by which all else is read, is compared whole."""
    marker, digest = output.marker(), sets.digest_of(config.data)
    if marker.corpus not in ("", digest):
        raise Refused(
            f"data.tokens holds other tokens than those that the run in {output.root} was begun with, so other samples "
            f"would follow; put them back, or start another run in another output_dir"
        )
    for _, prefix in config.data.token_sets:
        listing.check_files(prefix, ("idx",))
    if not marker.corpus:
        marker.changed(corpus=digest).write(output.root)


def _of_sets(config: TrainConfig) -> Datasets:
    """A part of each set's documents validates; both splits are blended by the same weights."""
    weights, splits = [], {split: [] for split in SPLITS}  # type: tuple[list[float], dict[str, list[Samples]]]
    for (weight, prefix), made in zip(config.data.token_sets, sets.read_all(config.data), strict=True):
        weights.append(weight)
        documents = IndexedDataset(str(prefix))
        for split, chosen in split_documents(
            len(documents), config.data.validation_fraction, f"tokens {made.sha256['idx']}"
        ).items():
            run, packed = config.run, config.data.is_packed
            splits[split].append(Samples(documents, run.sequence_length, run.seed, chosen, packed))
        check_length(splits["train"][-1].num_tokens, config.run.sequence_length)
    return Datasets(*(Blend(splits[split], weights) for split in ("train", "validation")))


def _opened(prefix: Path) -> IndexedDataset:
    """RuntimeError where the file of tokens is shorter than its index says, as this process sees it."""
    index = IndexedDataset(str(prefix), mmap=False).index  # a map of an empty file cannot be made
    needed = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size
    if (held := Path(f"{prefix}.bin").stat().st_size) < needed:
        raise RuntimeError(
            f"{prefix}.bin has {held} bytes, and {prefix}.idx lists {needed}, so part of the texts is missing; remove "
            f"{prefix.parent}, which is packed again if data.folder still has the same texts"
        )
    return IndexedDataset(str(prefix))


def _pack(config: TrainConfig, output: OutputDir) -> str:
    marker = output.marker()
    digest = write_corpus(config.data, output.data, marker.corpus, but_not=output.root)
    if digest != marker.corpus:
        marker.changed(corpus=digest).write(output.root)
    return digest


@dataclass(frozen=True)
class BatchCutter:
    """Deals a global batch out to replicas, and each sequence to context-parallel ranks by the plan.

    Sample i of a step goes to micro-batch i // (dp_size * micro_batch_size), so which samples a step sees does not
    depend on how many replicas there are. With a packer the samples of a micro-batch are one row.
    """

    config: TrainConfig
    world: World
    plan: ShardPlan  # of a sequence that is one document
    packer: Packer | None = None

    @property
    def num_micro_batches(self) -> int:
        return self.config.run.global_batch_size // (self.config.run.micro_batch_size * self.world.dp_size)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens of a row over all ranks) of a micro-batch."""
        rows, length = self.config.run.micro_batch_size, self.config.run.sequence_length
        return (rows, length) if self.packer is None else (1, rows * length)

    def micro_batches(self, samples: SampleSource, first: int) -> Iterator[Batch]:
        """This rank's parts of the global batch of samples from number `first` on."""
        return self.placed(self.host_batch(samples, numbers) for numbers in self.numbers(first))

    def placed(self, parts: Iterable[HostBatch]) -> Iterator[Batch]:
        """Batches on the device, in order.

        Each is made before the one ahead of it is given out, so that what its ranks ask each other about a pack is
        answered while that one is computed.
        """
        ahead: list[Batch] = []
        for part in parts:
            ahead.append(self._placed(part))
            if len(ahead) > 1:
                yield ahead.pop(0)
        yield from ahead

    def numbers(self, first: int) -> Iterator[range]:
        """Of the samples in each of them; the same on all ranks of a replica."""
        size = self.config.run.micro_batch_size
        for micro in range(self.num_micro_batches):
            start = first + (micro * self.world.dp_size + self.world.dp_rank) * size
            yield range(start, start + size)

    def samples_of(self, shards: Sequence[Tensor], pack: Pack | None) -> Tensor:
        """What every context-parallel rank has of a micro-batch, [T, rows] each -> [micro_batch_size, N]."""
        if pack is None:
            return self.plan.unshard(shards).T
        return pack.unshard(shards).view(self.config.run.micro_batch_size, -1)

    def host_batch(
        self,
        samples: SampleSource,
        numbers: Iterable[int],
        plan: Callable[[tuple[int, ...]], Pack | None] = lambda bounds: None,
    ) -> HostBatch:
        """This rank's part of a micro-batch of these samples: nothing but the host's work.

        plan        `Packer.plan`, or None for what need not be planned ahead
        """
        drawn, rank = [self._whole(samples[n]) for n in numbers], self.world.cp.rank
        names = self._names
        if self.packer is None:
            return HostBatch({x: torch.stack([self.plan.shard(s[x], rank) for s in drawn]) for x in names})
        bounds = joined([sample["cu_seqlens"] for sample in drawn])
        cut, planned = self.packer.cut(bounds), plan(bounds)
        rows = {name: torch.cat([s[name] for s in drawn]) for name in names}
        parts = {name: (row if cut is None else cut.shard(row, rank))[None] for name, row in rows.items()}
        return HostBatch(parts, bounds, planned)

    @property
    def _names(self) -> tuple[str, ...]:
        return Samples.names if self.config.model.mtp_num_layers is None else (*Samples.names, *mtp_labels.NAMES)

    def _whole(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        """All that is to be cut of a sample."""
        depths = self.config.model.num_mtp_layers
        return sample if not depths else sample | mtp_labels.predicted(sample, depths)

    def _placed(self, part: HostBatch) -> Batch:
        pack = None if self.packer is None or part.bounds is None else self.packer.of(part.bounds, part.planned)
        return Batch(**{name: put_on(self.world.device, x) for name, x in part.parts.items()}, pack=pack)


def sequence_plan(config: TrainConfig) -> ShardPlan:
    """How one sequence of the run is cut: a single document over its whole length."""
    make = ShardPlan.zigzag if config.parallel.layout == "zigzag" else ShardPlan.contiguous
    return make([0, config.run.sequence_length], config.parallel.context_parallel_size, config.nsa.slc_block_len)

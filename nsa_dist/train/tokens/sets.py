"""The token sets that a run trains on: judged by their listings, before any process starts."""

import hashlib
import json

from nsa_dist.train.config import VOCAB_SIZE, TrainConfig
from nsa_dist.train.refused import Refused
from nsa_dist.train.sections.data import DataSection
from nsa_dist.train.tokens import listing
from nsa_dist.train.tokens.listing import TokenSet

_ROWS = 128  # the embedding's rows are a multiple of it, as Megatron has them by default


def read_all(data: DataSection) -> list[TokenSet]:
    """In the order of `data.token_sets`. Refused where one is not whole, or they are not of one vocabulary."""
    sets = [listing.read(prefix) for _, prefix in data.token_sets]
    first = sets[0]
    for (_, prefix), other in zip(data.token_sets, sets, strict=True):
        if (other.tokenizer, other.vocab_size) != (first.tokenizer, first.vocab_size):
            raise Refused(
                f"data.tokens: {prefix} has a vocabulary of {other.vocab_size} ({other.tokenizer}), and "
                f"{data.token_sets[0][1]} one of {first.vocab_size} ({first.tokenizer}), so one number would be two "
                f"tokens; build both with the same --tokenizer"
            )
    return sets


def digest_of(data: DataSection) -> str:
    """Of the sets' contents, weights and split, wherever they lie: what a run may go on with."""
    weights = [weight for weight, _ in data.token_sets]
    sets = [made.digest for made in read_all(data)]
    return hashlib.sha256(json.dumps([weights, sets, data.validation_fraction]).encode()).hexdigest()


def check(data: DataSection, sequence_length: int) -> None:
    """Refused where a set has too few documents or tokens, as far as listings say."""
    for (_, prefix), made in zip(data.token_sets, read_all(data), strict=True):
        if made.documents < 2:
            raise Refused(
                f"data.tokens: {prefix} holds {made.documents} document, but training and validation need one each at "
                f"least; build it from more files, or with --json-key from lines"
            )
        if made.tokens < sequence_length:
            raise Refused(
                f"sequence_length={sequence_length} is more than the {made.tokens} tokens of data.tokens {prefix}, so "
                f"that a sequence would hold them more than once; take a smaller one, or a larger set"
            )


def vocab_size(config: TrainConfig) -> int:
    """Tokens that there are: of the sets, or the bytes. Refused."""
    return read_all(config.data)[0].vocab_size if config.data.token_sets else VOCAB_SIZE


def padded_vocab_size(config: TrainConfig) -> int:
    """Rows of the embedding: the same for every tensor parallel size, so that a checkpoint fits all. Refused."""
    rows = -(-vocab_size(config) // _ROWS) * _ROWS
    tensor = config.parallel.tensor_model_parallel_size
    if config.data.token_sets and rows % tensor:
        raise Refused(
            f"tensor_model_parallel_size={tensor} does not divide the {rows} rows of the embedding (the vocabulary, "
            f"padded to a multiple of {_ROWS}), and every rank holds as many; take one that does"
        )
    return rows

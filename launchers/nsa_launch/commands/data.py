"""`nsa-dist data`: token sets made and checked, and what is said of them meanwhile."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from nsa_dist.train.tokens import build as building
from nsa_dist.train.tokens import listing
from nsa_dist.train.tokens.listing import TokenSet


def build(arguments: argparse.Namespace, jobs: int) -> None:
    """Make the set that the command line asks for; a bar, and at the end what it is. Refused."""
    prefix = arguments.out.expanduser().absolute()
    request = building.Request(
        places=arguments.places,
        prefix=prefix,
        tokenizer=arguments.tokenizer,
        end_of_document=arguments.end_of_document,
        json_key=arguments.json_key,
        pattern=arguments.pattern,
        max_file_bytes=arguments.max_file_bytes,
        jobs=jobs,
    )
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.fields[made]}"))
    with Bar(TextColumn("texts"), *columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        line = bar.add_task("build", total=None, made="")

        def show(progress: building.Progress) -> None:
            made = f"{progress.documents:,} documents, {progress.tokens:,} tokens"
            bar.update(line, total=progress.bytes, completed=progress.done_bytes, made=made)

        made = building.build(request, show)
    _say(prefix, made)


def check(prefix: Path) -> None:
    """Refused unless every byte of the set is as it was written."""
    prefix = prefix.expanduser().absolute()
    _say(prefix, listing.check_files(prefix))


def _say(prefix: Path, made: TokenSet) -> None:
    print(
        f"{prefix}: {made.documents:,} documents, {made.tokens:,} tokens of a vocabulary of {made.vocab_size:,}, "
        f"{sum(made.bytes.values()):,} bytes"
    )
    if number := made.left_out["number"]:
        print(f"{number:,} texts were left out:")
        for text in made.left_out["first"]:
            print(f"  {text.encode('utf-8', 'backslashreplace').decode()}")
        if number > len(made.left_out["first"]):
            print(f"  and {number - len(made.left_out['first']):,} more")

"""What a trainer that is killed leaves behind: no process."""

import signal
import subprocess
import sys
from pathlib import Path

from nsa_dist.train.files.output import OutputDir
from train_cases import write_texts

TESTS = Path(__file__).parents[1]
TRAINS = """
if __name__ == "__main__":  # a process that is spawned would import the rest of this file
    import sys
    from pathlib import Path
    import torch.distributed as dist
    from train_cases import KillAfter, run, small_config
    base = Path(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{base}/meet", rank=0, world_size=1)
    run(small_config(base, "killed"), KillAfter(3))
"""


def test_nobody_holds_a_killed_trainers_output_open(tmp_path):
    """It has saved a checkpoint, for which Megatron would have started a process."""
    write_texts(tmp_path / "texts")
    (tmp_path / "trains.py").write_text(f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n{TRAINS}")
    command = [sys.executable, str(tmp_path / "trains.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert OutputDir(tmp_path / "killed").checkpointed_step() == 2

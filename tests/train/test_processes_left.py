"""What a trainer that is killed leaves behind: no process."""

import os
import signal
import subprocess
import sys

SAVES = """
if __name__ == "__main__":  # a spawned process imports the rest of this file
    import multiprocessing, time
    from nsa_dist.train.checkpoint import leave_no_process_behind
    for _ in range(2):
        leave_no_process_behind()
    (child,) = multiprocessing.active_children()
    print(child.pid, flush=True)
    time.sleep(600)
"""


def test_the_process_of_megatrons_writers_ends_with_a_trainer_that_is_killed(tmp_path):
    (tmp_path / "saves.py").write_text(SAVES)
    with subprocess.Popen([sys.executable, tmp_path / "saves.py"], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        left = int(trainer.stdout.readline())
        os.kill(left, 0)  # it is there
        trainer.send_signal(signal.SIGKILL)
        trainer.communicate(timeout=60)  # waits for everybody who holds the trainer's output open
    assert trainer.returncode == -signal.SIGKILL

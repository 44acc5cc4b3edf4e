"""A batch script for Slurm that starts Ray on whole nodes, and a run on it."""

import argparse
import shlex

from nsa_launch import exit_codes
from nsa_launch.config import RunConfig
from nsa_launch.jobs import remote

_BEFORE_THE_LIMIT_S = 300
_END = "END_OF_CONFIG"
_MOST_REQUEUES = 100

_SCRIPT = """#!/usr/bin/env bash
# nsa-dist render slurm: a run on {nodes} whole nodes: sbatch THIS_FILE [key=value ...]
# One task a node; `ray symmetric-run` starts Ray on all of them, runs the command on the first and ends with
# `ray stop`, which ends every Ray on the node: hence --exclusive.
#
# To stop it with a checkpoint: scancel --batch --signal=TERM JOBID, or touch {stop}
# Plain scancel ends Ray and the ranks at once, with no time for a checkpoint.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
{gpus}#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time={time}
{partition}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@{before_s}
set -euo pipefail

run={run}
config="$run.$SLURM_JOB_ID.yaml" # beside it, on storage that every node mounts
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
mkdir -p "$run"
cat > "$config" <<'{end}'
{config}{end}

# Five minutes before the time limit (USR1): save a checkpoint, stop, queue up again. On TERM: save and stop.
requeue=no
stopping=no
trap 'requeue=yes; stopping=yes' USR1
trap 'stopping=yes' TERM
{interface}
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_NNODES" \\
  {num_gpus}--object-store-memory 2000000000 -- \\
  nsa-dist train "$config" resume=true overwrite=false launch.address="$head:6379" "$@" &
step=$!
while kill -0 "$step" 2> /dev/null; do
  # Again and again: the run takes a STOP from before its start away.
  if [ "$stopping" = yes ]; then
    touch "$run/STOP"
  fi
  sleep 5 &
  wait $! || true # a signal ends the wait, not the step
done
code=0
wait "$step" || code=$?
if [ "$code" -eq {no_resources} ]; then
  requeue=yes # no room, or its controller kept dying: as good as new later
fi
if [ "$requeue" = yes ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def rendered(config: RunConfig, asked: argparse.Namespace) -> str:
    """The script, with the configuration inside."""
    ranks, on_gpus = config.processes_per_node, config.launch.device != "cpu"
    exports = f"export NCCL_SOCKET_IFNAME={asked.interface} GLOO_SOCKET_IFNAME={asked.interface}\n"
    output_dir = config.run.output_dir
    return _SCRIPT.format(
        nodes=config.launch.nodes,
        name=shlex.quote(asked.name or output_dir.name),
        stop=output_dir / "STOP",
        cpus=max(1, round(ranks * config.launch.cpus_per_process)),
        gpus=f"#SBATCH --gpus-per-node={ranks}\n" if on_gpus else "",
        num_gpus=f"--num-gpus {ranks} " if on_gpus else "",
        time=asked.time,
        partition=f"#SBATCH --partition={asked.partition}\n" if asked.partition else "",
        before_s=_BEFORE_THE_LIMIT_S,
        run=shlex.quote(str(output_dir)),
        config=remote.as_yaml(config),
        end=_END,
        interface=exports if asked.interface else "",
        no_resources=exit_codes.NO_RESOURCES,
        most=_MOST_REQUEUES,
    )

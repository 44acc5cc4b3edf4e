"""A KubeRay RayJob and the ConfigMap of its configuration."""

import argparse
import re
from typing import Any

import yaml

from nsa_dist.train.refused import Refused
from nsa_launch.config import RunConfig
from nsa_launch.jobs import remote

_RAY = "2.60.0"
_WHERE = "/etc/nsa-dist"
_GRACE_S = 60  # what a pod gets beyond the run's own `stop_grace_s`
_HEAD = """# nsa-dist render k8s: a run on {nodes} nodes through KubeRay (1.5.1 or newer): kubectl apply -f THIS_FILE
# The command runs on the head. backoffLimit 0: each retry would be a new cluster, for a mistake in the configuration,
# too; lost ranks are started again inside the job (launch.max_failures). Apply it again to go on from the newest
# checkpoint.
"""


def rendered(config: RunConfig, asked: argparse.Namespace) -> str:
    """Two YAML documents. ValueError where the run's folders would not be on the mounted storage."""
    name = re.sub(r"[^a-z0-9-]+", "-", (asked.name or config.run.output_dir.name).lower()).strip("-")[:40] or "run"
    _check_mounted(config, asked.mount)
    documents = [_config_map(name, config), _job(name, config, asked)]
    return _HEAD.format(nodes=config.launch.nodes) + yaml.safe_dump_all(documents, sort_keys=False, width=120)


def _check_mounted(config: RunConfig, mount: str) -> None:
    for key, place in {"output_dir": config.run.output_dir, **config.data.places}.items():
        if not place.is_relative_to(mount):
            raise Refused(
                f"{key}={place} is not below {mount}, where every pod mounts the shared storage, and would be lost "
                f"with its pod; take {key}={mount.rstrip('/')}/{place.name}, or give another --mount"
            )


def _config_map(name: str, config: RunConfig) -> dict[str, Any]:
    run = config.run.model_copy(update={"resume": True, "overwrite": False})
    text = remote.as_yaml(config.model_copy(update={"run": run}))
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"config.yaml": text}}


def _job(name: str, config: RunConfig, asked: argparse.Namespace) -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": f"nsa-dist train {_WHERE}/config.yaml",
            "submissionMode": "HTTPMode",  # no submitter pod that could be evicted
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "rayVersion": _RAY,
                "enableInTreeAutoscaling": False,
                "authOptions": {"mode": "token"},
                "headGroupSpec": _head(name, config, asked),
                "workerGroupSpecs": [_workers(name, config, asked)],
            },
        },
    }


def _head(name: str, config: RunConfig, asked: argparse.Namespace) -> dict[str, Any]:
    """No rank may land here; the driver and Ray Train's controller do."""
    size = {"cpu": "8", "memory": "32Gi"}
    stop_s = round(config.launch.stop_grace_s) + _GRACE_S // 2
    env = {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_s)}  # `ray job stop` kills after 3 s otherwise
    start = {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0", "object-store-memory": "500000000"}
    probe = _probe("/api/gcs_healthz", 8265)
    return {
        "rayStartParams": start,
        "template": _pod("ray-head", name, config, asked, size, env, probe, shared_gib=4),
    }


def _workers(name: str, config: RunConfig, asked: argparse.Namespace) -> dict[str, Any]:
    launch, ranks = config.launch, config.processes_per_node
    size = {"cpu": str(-(-int(ranks * launch.cpus_per_process * 100) // 100) + 4)}
    size["memory"] = f"{ranks * asked.memory_gib}Gi"
    start = {"object-store-memory": "2000000000", "dashboard-agent-listen-port": "52365"}
    if launch.device != "cpu":
        size["nvidia.com/gpu"] = start["num-gpus"] = str(ranks)
    if asked.rdma:
        resource, _, number = asked.rdma.partition("=")
        size[resource] = number or "1"
    env = {"RAY_memory_monitor_refresh_ms": "0"}  # Ray's own out-of-memory killer must not choose ranks
    if asked.interface:
        env |= {"NCCL_SOCKET_IFNAME": asked.interface, "GLOO_SOCKET_IFNAME": asked.interface}
    probe = _probe("/api/local_raylet_healthz", 52365)
    template = _pod("ray-worker", name, config, asked, size, env, probe, shared_gib=64)
    if asked.rdma:  # registering memory with the card
        template["spec"]["containers"][0]["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    nodes = launch.nodes
    return {
        "groupName": "ranks",
        "replicas": nodes,
        "minReplicas": nodes,
        "maxReplicas": nodes,
        "rayStartParams": start,
        "template": template,
    }


def _pod(
    container: str,
    name: str,
    config: RunConfig,
    asked: argparse.Namespace,
    size: dict[str, str],
    env: dict[str, str],
    probes: dict[str, Any],
    shared_gib: int,
) -> dict[str, Any]:
    mounts = {"runs": asked.mount, "config": _WHERE, "dshm": "/dev/shm"}
    return {
        "spec": {
            "terminationGracePeriodSeconds": round(config.launch.stop_grace_s) + _GRACE_S,
            "containers": [
                {
                    "name": container,
                    "image": asked.image,
                    "env": [{"name": key, "value": value} for key, value in env.items()],
                    "resources": {"requests": dict(size), "limits": dict(size)},
                    "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
                    **probes,
                }
            ],
            "volumes": [
                {"name": "runs", "persistentVolumeClaim": {"claimName": asked.claim}},
                {"name": "config", "configMap": {"name": name}},
                {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_gib}Gi"}},
            ],
        }
    }


def _probe(path: str, port: int) -> dict[str, Any]:
    """Asked by the kubelet itself; KubeRay's own run `wget` inside the image."""
    patience = {"readinessProbe": (10, 12), "livenessProbe": (60, 60)}
    return {
        kind: {
            "httpGet": {"path": path, "port": port},
            "timeoutSeconds": 5,
            "periodSeconds": 10,
            "initialDelaySeconds": delay_s,
            "failureThreshold": failures,
        }
        for kind, (delay_s, failures) in patience.items()
    }

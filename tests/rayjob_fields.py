"""The fields that KubeRay's RayJob (ray.io/v1) takes, after its custom resource definition (August 2026).

By path inside `spec`, as far as our files go: `[]` for the members of a list, a pod's from `template` on;
`!` marks what must be given; None: any names.
"""

FIELDS: dict[str, str | None] = {
    "": (
        "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
        "entrypointNumGpus entrypointResources jobId managedBy metadata preRunningDeadlineSeconds "
        "rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig "
        "submitterPodTemplate suspend ttlSecondsAfterFinished"
    ),
    "rayClusterSpec": (
        "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec! "
        "headServiceAnnotations historyServerOptions managedBy networkPolicy rayVersion suspend tlsOptions "
        "upgradeStrategy workerGroupSpecs"
    ),
    "rayClusterSpec.authOptions": "enableK8sTokenAuth mode secretName",
    "rayClusterSpec.headGroupSpec": (
        "enableIngress headService ingressOptions labels rayStartParams resources serviceType template!"
    ),
    "rayClusterSpec.headGroupSpec.rayStartParams": None,
    "template": "metadata spec",
    "template.spec": (
        "activeDeadlineSeconds affinity automountServiceAccountToken containers! dnsConfig dnsPolicy "
        "enableServiceLinks ephemeralContainers hostAliases hostIPC hostNetwork hostPID hostUsers hostname "
        "hostnameOverride imagePullSecrets initContainers nodeName nodeSelector os overhead preemptionPolicy "
        "priority priorityClassName readinessGates resourceClaims resources restartPolicy runtimeClassName "
        "schedulerName schedulingGates schedulingGroup securityContext serviceAccount serviceAccountName "
        "setHostnameAsFQDN shareProcessNamespace subdomain terminationGracePeriodSeconds tolerations "
        "topologySpreadConstraints volumes"
    ),
    "template.spec.containers[]": (
        "args command env envFrom image imagePullPolicy lifecycle livenessProbe name! ports readinessProbe "
        "resizePolicy resources restartPolicy restartPolicyRules securityContext startupProbe stdin stdinOnce "
        "terminationMessagePath terminationMessagePolicy tty volumeDevices volumeMounts workingDir"
    ),
    "template.spec.containers[].env[]": "name! value valueFrom",
    "template.spec.containers[].resources": "claims limits requests",
    "template.spec.containers[].resources.requests": None,
    "template.spec.containers[].resources.limits": None,
    "template.spec.containers[].volumeMounts[]": (
        "mountPath! mountPropagation name! readOnly recursiveReadOnly subPath subPathExpr"
    ),
    "template.spec.containers[].readinessProbe": (
        "exec failureThreshold grpc httpGet initialDelaySeconds periodSeconds successThreshold tcpSocket "
        "terminationGracePeriodSeconds timeoutSeconds"
    ),
    "template.spec.containers[].readinessProbe.httpGet": "host httpHeaders path port! scheme",
    "template.spec.containers[].livenessProbe": (
        "exec failureThreshold grpc httpGet initialDelaySeconds periodSeconds successThreshold tcpSocket "
        "terminationGracePeriodSeconds timeoutSeconds"
    ),
    "template.spec.containers[].livenessProbe.httpGet": "host httpHeaders path port! scheme",
    "template.spec.volumes[]": (
        "awsElasticBlockStore azureDisk azureFile cephfs cinder configMap csi downwardAPI emptyDir ephemeral "
        "fc flexVolume flocker gcePersistentDisk gitRepo glusterfs hostPath image iscsi name! nfs "
        "persistentVolumeClaim photonPersistentDisk portworxVolume projected quobyte rbd scaleIO secret "
        "storageos vsphereVolume"
    ),
    "template.spec.volumes[].persistentVolumeClaim": "claimName! readOnly",
    "template.spec.volumes[].configMap": "defaultMode items name optional",
    "template.spec.volumes[].emptyDir": "medium sizeLimit",
    "rayClusterSpec.workerGroupSpecs[]": (
        "groupName! idleTimeoutSeconds labels maxReplicas! minReplicas! numOfHosts priority rayStartParams "
        "replicas resources scaleStrategy suspend template!"
    ),
    "rayClusterSpec.workerGroupSpecs[].rayStartParams": None,
    "template.spec.containers[].securityContext": (
        "allowPrivilegeEscalation appArmorProfile capabilities privileged procMount readOnlyRootFilesystem "
        "runAsGroup runAsNonRoot runAsUser seLinuxOptions seccompProfile windowsOptions"
    ),
    "template.spec.containers[].securityContext.capabilities": "add drop",
}


def unknown(value: object, path: str = "") -> list[str]:
    """Fields of a `spec` that KubeRay would refuse or drop, and those that it asks for and does not get."""
    if isinstance(value, list):
        return [found for member in value for found in unknown(member, f"{path}[]")]
    if not isinstance(value, dict) or FIELDS.get(path, "") is None:
        return []
    words = (FIELDS.get(path) or "").split()
    known = {word.rstrip("!") for word in words}
    needed = {word.rstrip("!") for word in words if word.endswith("!")}
    wrong = [f"{path}.{name}".lstrip(".") for name in sorted((value.keys() - known) | (needed - value.keys()))]
    for name, member in value.items():
        wrong += unknown(member, name if name == "template" else f"{path}.{name}".lstrip("."))
    return wrong

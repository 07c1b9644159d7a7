"""What a step asks of the cluster: resources, nodes, time, stores. A laptop ignores all of it.

`kfp.local` ignores environment variables from config maps silently, so every one of them has a
default in the settings that read it.
"""

from kfp import dsl, kubernetes

from pipelines.volumes import volumes

CONFIG_MAP = "hrnn-config"  # k8s/base: where the stores are
SECRET = "hrnn-secrets"  # noqa: S105 - its name; a team makes it, with any of the keys below
GPU = "nvidia.com/gpu"
LABELS = {"app.kubernetes.io/part-of": "hrnn-meta"}

CONFIGURED = (
    "HRNN_FEATURE_ROOT",
    "HRNN_ONLINE_STORE",
    "HRNN_REDIS_URL",
    "HRNN_REGISTRY_URL",
    "HRNN_SOURCES_URI",
    "HRNN_EVENT_LOG",
)
# Addresses that hold a password may be in the secret instead: a later variable wins, and a key
# that the secret lacks sets nothing.
SECRETS = (
    "HRNN_NOTIFY_URL",
    "HRNN_REDIS_URL",
    "HRNN_REGISTRY_URL",
    "HRNN_EVENT_LOG",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT_URL",
)


def resources(
    task: dsl.PipelineTask,
    *,
    cpu: str,
    memory: str,
    timeout_seconds: int = 6 * 3600,
    cached: bool = False,
) -> None:
    """Requests and limits, a deadline after which the pod is stopped, labels, caching.

    Args:
        memory: request and limit alike, so that a step is never evicted for using what it asked
            for.
        cached: a run with the same inputs and code takes the outputs of an earlier one; not for
            steps that change a store.
    """
    task.set_caching_options(cached)
    task.set_cpu_request(cpu).set_memory_request(memory).set_memory_limit(memory)
    kubernetes.set_timeout(task, seconds=timeout_seconds)
    for key, value in LABELS.items():
        kubernetes.add_pod_label(task, key, value)
    kubernetes.add_pod_label(task, "app.kubernetes.io/component", task.name)


def gpu(task: dsl.PipelineTask, *, count: int = 1, shared_memory: str = "2Gi") -> None:
    """The step runs on a GPU node, and only such a step may occupy one.

    Args:
        shared_memory: size of /dev/shm, which PyTorch's loader and NCCL use; Kubernetes gives
            64 MB otherwise. It counts as the container's memory.
    """
    task.set_accelerator_type(GPU).set_accelerator_limit(count)
    # Set by NVIDIA's feature discovery on every node that has one.
    kubernetes.add_node_selector(task, "nvidia.com/gpu.present", "true")
    kubernetes.add_toleration(task, key=GPU, operator="Exists", effect="NoSchedule")
    kubernetes.empty_dir_mount(
        task,
        volume_name="shm",
        mount_path="/dev/shm",  # noqa: S108 - the pod's own
        medium="Memory",
        size_limit=shared_memory,
    )


def configured(task: dsl.PipelineTask) -> None:
    """The step gets its addresses and secrets from the cluster, as environment variables."""
    kubernetes.use_config_map_as_env(
        task,
        config_map_name=CONFIG_MAP,
        config_map_key_to_env={name: name for name in CONFIGURED},
        optional=True,
    )
    kubernetes.use_secret_as_env(
        task,
        secret_name=SECRET,
        secret_key_to_env={name: name for name in SECRETS},
        optional=True,
    )


def stores(task: dsl.PipelineTask) -> None:
    """The step reaches the stores and the event log: addresses, secrets, volumes."""
    configured(task)
    for claim, folder in volumes().items():
        kubernetes.mount_pvc(task, pvc_name=claim, mount_path=folder)


def retried(task: dsl.PipelineTask, times: int = 2, wait_seconds: int = 60) -> None:
    """Try again after a while, then twice that: nodes are drained, stores restart.

    A pod cannot tell the cluster that its error was the user's, so steps that refuse input are
    not retried; by the time later steps run, their input has been checked.
    """
    task.set_retry(num_retries=times, backoff_duration=f"{wait_seconds}s", backoff_factor=2.0)

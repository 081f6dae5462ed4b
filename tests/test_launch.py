"""The launchers: files that the engines would take, and the same number wherever it is repeated."""

import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxsynth.cli.parser import parse
from tests.test_sweep import SMOKE, sweep  # noqa: F401

LAUNCH = Path(__file__).parents[1] / "launch"

# The fields used of the APIs core/v1, batch/v1 and jobset.x-k8s.io/v1alpha2, each with what it
# holds: a type, a list of a kind ([kind]), or a kind below. A name ending in ! is required.
TEXTS = dict[str, str]
KINDS = {
    "Service": {"apiVersion!": "v1", "kind!": str, "metadata!": "Meta", "spec!": "ServiceSpec"},
    "ServiceSpec": {"clusterIP": str, "publishNotReadyAddresses": bool, "selector": TEXTS},
    "Job": {"apiVersion!": "batch/v1", "kind!": str, "metadata!": "Meta", "spec!": "JobSpec"},
    "JobSet": {
        "apiVersion!": "jobset.x-k8s.io/v1alpha2", "kind!": str, "metadata!": "Meta",
        "spec!": "JobSetSpec",
    },
    "JobSetSpec": {"failurePolicy": "FailurePolicy", "replicatedJobs!": ["ReplicatedJob"]},
    "FailurePolicy": {"maxRestarts": int},
    "ReplicatedJob": {"name!": str, "replicas": int, "template!": "JobTemplate"},
    "JobTemplate": {"metadata": "Meta", "spec!": "JobSpec"},
    "JobSpec": {
        "completionMode": str, "completions": int, "parallelism": int, "backoffLimit": int,
        "backoffLimitPerIndex": int, "maxFailedIndexes": int, "template!": "PodTemplate",
    },
    "PodTemplate": {"metadata": "Meta", "spec!": "PodSpec"},
    "PodSpec": {
        "subdomain": str, "restartPolicy!": str, "containers!": ["Container"],
        "volumes": ["Volume"], "nodeSelector": TEXTS, "serviceAccountName": str,
        "terminationGracePeriodSeconds": int,
    },
    "Container": {
        "name!": str, "image!": str, "workingDir": str, "command": [str], "args": [str],
        "env": ["Env"], "resources": "Resources", "volumeMounts": ["Mount"], "ports": ["Port"],
    },
    "Env": {"name!": str, "value!": str},
    "Port": {"containerPort!": int},
    "Resources": {"limits": dict[str, int]},
    "Mount": {"name!": str, "mountPath!": str},
    "Volume": {"name!": str, "persistentVolumeClaim": "Claim", "csi": "Csi"},
    "Claim": {"claimName!": str},
    "Csi": {"driver!": str, "volumeAttributes": TEXTS},
    "Meta": {"name": str, "annotations": TEXTS, "labels": TEXTS},
}  # fmt: skip


def faults(value, kind, where: str) -> list[str]:
    """What an API server would refuse in a value of a kind."""
    if isinstance(kind, list):
        if not isinstance(value, list):
            return [f"{where}: expected a list"]
        each = enumerate(value)
        return [fault for i, one in each for fault in faults(one, kind[0], f"{where}[{i}]")]
    if isinstance(kind, type):
        return [] if type(value) is kind else [f"{where}: expected {kind.__name__}, got {value!r}"]
    if kind in (TEXTS, dict[str, int]):
        inner = kind.__args__[1]
        return [
            fault for key, one in value.items() for fault in faults(one, inner, f"{where}.{key}")
        ]
    if kind not in KINDS:
        return [] if value == kind else [f"{where}: expected {kind}, got {value!r}"]
    known = {name.rstrip("!"): inner for name, inner in KINDS[kind].items()}
    found = [f"{where}: no field {name}" for name in value if name not in known]
    required = [name.rstrip("!") for name in KINDS[kind] if name.endswith("!")]
    found += [f"{where}: {name} is missing" for name in required if name not in value]
    for name, one in value.items():
        found += faults(one, known[name], f"{where}.{name}") if name in known else []
    return found


def objects(text: str) -> dict[str, dict]:
    """By kind; every name fits Kubernetes' rule for labels."""
    found = {one["kind"]: one for one in yaml.safe_load_all(text)}
    for kind, one in found.items():
        assert not faults(one, kind, kind)
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", one["metadata"]["name"])
    return found


def pod(job: dict) -> dict:
    """The pod of a Job's spec, whose volumes are those that its container mounts."""
    spec = job["template"]["spec"]
    mounted = {mount["name"] for one in spec["containers"] for mount in one["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}
    return spec


def starts(argv: list[str]) -> None:
    """`jaxsynth` takes these arguments."""
    assert argv[0].endswith("jaxsynth") and parse(argv[1:]).verb == "run"


def test_the_indexed_job_is_one_that_kubernetes_takes():
    found = objects((LAUNCH / "kubernetes.yaml").read_text())
    job, service = found["Job"], found["Service"]
    spec = pod(job["spec"])
    container = spec["containers"][0]
    env = {one["name"]: one["value"] for one in container["env"]}
    assert job["spec"]["completionMode"] == "Indexed"
    count = {job["spec"]["completions"], job["spec"]["parallelism"], int(env["JAX_NUM_PROCESSES"])}
    assert len(count) == 1
    # Pod 0 is found by the Service, whose name the pods have as their subdomain.
    name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
    assert spec["subdomain"] == subdomain and service["spec"]["selector"] == {"job-name": name}
    assert env["JAX_COORDINATOR_ADDRESS"].startswith(f"{name}-0.{subdomain}:")
    assert spec["restartPolicy"] in ("OnFailure", "Never")  # of a Job
    words = shlex.split(container["args"][0])
    assert words[0] == "JAX_PROCESS_ID=$JOB_COMPLETION_INDEX" and words[1] == "exec"
    starts(words[2:])


def test_the_jobset_has_a_pod_for_each_host_of_its_slice():
    jobs = objects((LAUNCH / "jobset.yaml").read_text())["JobSet"]["spec"]["replicatedJobs"]
    spec = jobs[0]["template"]["spec"]
    hosts = pod(spec)
    container = hosts["containers"][0]
    topology = hosts["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert spec["completions"] == spec["parallelism"] > 1
    assert spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    starts([*container["command"], *container["args"]])
    assert parse([*container["command"], *container["args"]][1:]).distributed


def test_a_sweeps_job_is_one_that_kubernetes_takes(sweep, tmp_path, capsys):  # noqa: F811
    grid = "--grid seed 0 1 2 --start=kubernetes --image=here/jaxsynth:1"
    assert sweep.main([SMOKE, f"--workdir={tmp_path / 'all'}", *grid.split()]) == 0
    job = objects(capsys.readouterr().out)["Job"]
    assert job["spec"]["completions"] == 3 and job["spec"]["completionMode"] == "Indexed"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("completionMode: Indexed", "completionmode: Indexed"), "no field completionmode"),
        (("completions: 2", "completions: two"), "completions: expected int, got 'two'"),
        (('value: "2"', "value: 2"), "value: expected str, got 2"),
        (("          image: REGISTRY/jaxsynth:TAG\n", ""), "image is missing"),
        (("batch/v1", "batch/v1beta1"), "expected batch/v1, got 'batch/v1beta1'"),
    ],
)
def test_a_fault_would_be_found(change, fault):
    text = (LAUNCH / "kubernetes.yaml").read_text()
    assert text.count(change[0]) >= 1
    job = list(yaml.safe_load_all(text.replace(*change)))[-1]
    assert any(fault in one for one in faults(job, "Job", "Job"))


# sbatch's long options that are used, and what their values look like.
SBATCH = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"1",  # one process a node
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d\d:\d\d:\d\d",
    "requeue": None,
    "signal": r"B:TERM@\d+",
    "output": r"[\w/-]+%j\.log",
}


def test_slurm_takes_the_batch_script():
    text = (LAUNCH / "slurm.sbatch").read_text()
    lines = text.splitlines()
    given = [line for line in lines if line.startswith("#SBATCH")]
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    # Those after the first command are comments to sbatch.
    assert lines[0] == "#!/bin/bash" and not any(line in lines[first:] for line in given)
    for line in given:
        name, _, value = line.removeprefix("#SBATCH --").partition("=")
        assert name in SBATCH, line
        pattern = SBATCH[name]
        assert not value if pattern is None else re.fullmatch(pattern, value), line
    command = next(line for line in lines if line.startswith("srun"))
    assert '"$@"' in command and command.rstrip("& ").endswith("--distributed")


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.glob("*.s[hb]*")))
def test_a_script_is_one_that_bash_reads(name):
    found = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")

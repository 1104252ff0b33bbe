"""The job files that the page on many machines shows: SLURM's is run, Kubernetes' is read."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from torch.distributed.run import parse_args

from zskd_nni.cli import app
from zskd_nni.recipes.load import load_recipe
from zskd_nni.synthesis import ImpressionStore

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "docs" / "howto" / "jobs"
# In the place of SLURM: each "machine" is a process of this one, which is called localhost.
SRUN = """#!/bin/bash
for machine in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & started+=($!); done
for process in "${started[@]}"; do wait "$process" || exit 1; done
"""
SCONTROL = "#!/bin/bash\necho localhost\n"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_slurm(tmp_path: Path) -> None:
    """Two machines, one process each, through torchrun's own rendezvous between them."""
    for name, content in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    job = tmp_path / "job.sh"
    written = (JOBS / "slurm.sh").read_text()
    assert "$head:29400" in written
    job.write_text(written.replace("29400", str(free_port())))
    told = {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "two"}
    chosen = {"RECIPE": "digits-prune50", "OUT": str(tmp_path / "store"), "SIZE": "60"}
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", str(job)],
        cwd=ROOT,
        env={**os.environ, **told, **chosen, "PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    assert "60 impressions in" in result.stdout
    assert ImpressionStore.open(tmp_path / "store").missing() == []


def test_kubernetes() -> None:
    service, job = yaml.safe_load_all((JOBS / "kubernetes.yml").read_text())
    name, spec = service["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    given = parse_args(container["args"])
    assert container["command"] == ["torchrun"]
    assert (given.module, given.training_script) == (True, "zskd_nni")
    assert int(given.nnodes) == spec["completions"] == spec["parallelism"]
    assert int(given.nproc_per_node) == container["resources"]["requests"]["cpu"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == name
    assert given.rdzv_endpoint.startswith(f"{job['metadata']['name']}-0.{name}:"), "the first pod, by the service"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for entry in container["env"]:
        assert f"{entry['name']}={entry['value']}" in (JOBS / "slurm.sh").read_text()
    command, *arguments = given.training_script_args
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parsed = commands[command].make_context(command, arguments).params
    load_recipe(parsed["recipe"])
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(str(parsed["out"]).startswith(mount) for mount in mounts), "what is made outlives the pods"

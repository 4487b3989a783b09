"""The doctor handles engines that raise, crash, hang or are not installed, and broken drivers."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import venv
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import ROOT

from launcher.doctor import cards
from launcher.doctor.__main__ import check_devices, check_engine, check_system
from launcher.doctor.cards import check_cards, check_compiler, check_cuda, locked_cuda
from launcher.doctor.checks import Check
from launcher.doctor.host import Host, describe
from launcher.doctor.trials import Ended, Engine, attempt, engine, nvml
from shards.machine.cards import cuda_devices

GIB = 1024**3
SETUP = "bash scripts/setup.sh && .venv/bin/python -m launcher.doctor"
HANGS = "import subprocess, time\nsubprocess.Popen(['/bin/sleep', '4321'])\ntime.sleep(600)"
MODULES = {
    "torch": "__version__ = '9.9'",
    "transformers": "__version__ = '8.8'\nAutoModelForCausalLM = 1",
    "accelerate": "raise SystemExit(3)",
    "lightning": "__version__ = '7.7'",
    "litgpt": "__version__ = '5.5'\nGPT = 1",
    "deepspeed": "import os\nprint('noise')\nos.abort()",
    "vllm": "print('noise')\nraise RuntimeError('''\nlibcuda.so.1: cannot open\nsecond line''')",
    "pynvml": "import os\nos.abort()",
    "httptools": "__version__ = '6.6'",
}
BOTH: dict[str, str | None] = {"torch": "9.9", "transformers": "8.8"}
ENGINES = [
    Engine("dummy", {}),
    Engine("fsdp", BOTH, "importing lightning took more than 4 s"),
    Engine("deepspeed", BOTH, "importing deepspeed crashed: SIGABRT"),
    Engine("tensor_parallel", BOTH),
    Engine("vllm", {"torch": "9.9"}, "vllm: RuntimeError: libcuda.so.1: cannot open"),
    Engine("transformers", BOTH, "accelerate: SystemExit: 3"),
    Engine("litgpt", {"torch": "9.9", "litgpt": "5.5"}, "importing lightning took more than 4 s"),
    Engine("endpoint", {"httptools": "6.6"}),
]


def write_modules(folder: Path, modules: dict[str, str]) -> Path:
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text + "\n")
    return folder


def doctor(modules: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor with an empty PATH, and with `modules` in place of the installed packages."""
    environ = {"PATH": "", "PYTHONPATH": str(modules)}
    command = [sys.executable, "-m", "launcher.doctor", *arguments]
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_engines_that_raise_crash_and_hang_are_told_as_such(tmp_path: Path) -> None:
    done = doctor(write_modules(tmp_path, MODULES | {"lightning": HANGS}), "--json", "--timeout", "4")
    found = json.loads(done.stdout)
    assert (done.returncode, found["engines"]) == (0, [asdict(one) | {"missing": []} for one in ENGINES])
    assert [check["found"] for check in found["checks"] if check["name"] == "GPUs"] == ["none: NVML crashed: SIGABRT"]
    left = [process for process in psutil.process_iter(["cmdline"]) if "4321" in (process.info["cmdline"] or [])]
    assert left == []


@pytest.mark.parametrize("rich", [{}, {"rich": "raise OSError('broken')"}], ids=["rich", "no rich"])
def test_table(tmp_path: Path, rich: dict[str, str]) -> None:
    done = doctor(write_modules(tmp_path, MODULES | rich))
    lines = [line for line in done.stdout.splitlines() if "vllm" in line]
    assert (done.returncode, done.stderr, len(lines)) == (0, "", 1)
    assert ("│" in lines[0]) != bool(rich)
    for words in ("broken", "RuntimeError: libcuda.so.1: cannot open", SETUP):
        assert words in lines[0]


def test_wrong_argument(tmp_path: Path) -> None:
    assert doctor(tmp_path, "--nonsense").returncode == 2


def test_missing_module_ends_the_trial() -> None:
    ended = attempt("launcher.doctor.importing", ["json", "no_such_module", "re"], 30)
    rows = [json.loads(line) for line in ended.out]
    assert rows == [
        {"importing": "json"},
        {"module": "json", "version": "2.0.9", "cuda": None},
        {"importing": "no_such_module"},
        {"module": "no_such_module", "missing": True},
    ]


@pytest.mark.slow
def test_engine_that_works_here() -> None:
    found = engine("transformers", 120)
    names = ("torch", "transformers", "accelerate")
    assert (found.error, found.versions) == (None, {name: importlib.metadata.version(name) for name in names})


@pytest.mark.parametrize(
    ("one", "on_gpus", "check"),
    [
        (Engine("dummy", {}), True, Check("backends", "dummy", "ok", "needs nothing")),
        (Engine("fsdp", BOTH), False, Check("backends", "fsdp", "ok", "torch 9.9, transformers 8.8")),
        (
            Engine("fsdp", BOTH, "lightning is not installed", ("lightning",)),
            False,
            Check(
                "backends",
                "fsdp",
                "missing",
                "lightning is not installed (with torch 9.9, transformers 8.8)",
                'pip install -e ".[fsdp]"',
            ),
        ),
        (
            Engine("vllm", {}, "torch is not installed", ("torch",)),
            True,
            Check("backends", "vllm", "missing", "torch is not installed", 'pip install -e ".[vllm]"'),
        ),
        (
            Engine("vllm", {}, "vllm is not installed", ("vllm",)),
            False,
            Check("backends", "vllm", "missing", "vllm is not installed", SETUP),
        ),
        (
            Engine("fsdp", BOTH),
            True,
            Check(
                "backends",
                "fsdp",
                "warning",
                "torch 9.9, transformers 8.8: a CPU build, and there are GPUs",
                "LAUNCHER_FLAVOR=cuda bash scripts/setup.sh",
            ),
        ),
        (Engine("fsdp", BOTH, cuda="13.0"), True, Check("backends", "fsdp", "ok", "torch 9.9, transformers 8.8")),
    ],
)
def test_line_of_an_engine(one: Engine, on_gpus: bool, check: Check) -> None:
    assert check_engine(one, on_gpus) == check


FAKE_NVML = """
NVML_NVLINK_MAX_LINKS, nvmlMemory_v2 = 4, 2
class NVMLError(Exception): pass
class Memory: total, reserved, free = 49 * 1024**3, 1024**3, 47 * 1024**3
class Process: pid, usedGpuMemory = 2**22 + 7, 1024**3
def unknown(*a): raise NVMLError('Not Supported')
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlSystemGetDriverVersion(): return b'580.1'
def nvmlSystemGetCudaDriverVersion_v2(): return 13010
def nvmlDeviceGetCount(): return 3
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(h): return 'NVIDIA RTX A6000'
def nvmlDeviceGetUUID(h): return f'GPU-{h}'
def nvmlDeviceGetMemoryInfo(h, version=1): return Memory() if h < 2 else unknown()
def nvmlDeviceGetEccMode(h): return [1, 1] if h == 0 else unknown()
def nvmlDeviceGetTotalEccErrors(h, kind, since): return 3 if h == 0 else unknown()
def nvmlDeviceGetPersistenceMode(h): return 1 if h == 0 else unknown()
def nvmlDeviceGetComputeMode(h): return 0 if h == 0 else unknown()
def nvmlDeviceGetComputeRunningProcesses(h): return [Process()] if h == 0 else unknown()
def nvmlDeviceGetCudaComputeCapability(h): return (8, 6)
def nvmlDeviceGetCurrPcieLinkGeneration(h): return 1
def nvmlDeviceGetMaxPcieLinkGeneration(h): return 4
nvmlDeviceGetCurrPcieLinkWidth = nvmlDeviceGetMaxPcieLinkWidth = lambda h: 16
def nvmlDeviceGetNvLinkState(h, link): return int(link < 2) if h < 2 and link < 3 else unknown()
nvmlDeviceGetMigMode = unknown
def nvmlDeviceGetTopologyCommonAncestor(a, b): return 30 if a + b == 1 else 50
def nvmlDeviceGetP2PStatus(a, b, what): return (0 if a + b == 1 else 1) if a + b < 3 else unknown()
"""


def test_cards_and_their_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(write_modules(tmp_path, {"pynvml": FAKE_NVML})))
    found, reason = nvml()
    assert found is not None
    assert reason == ""
    card = {
        "index": 0, "name": "NVIDIA RTX A6000", "uuid": "GPU-0", "memory_bytes": 48 * GIB, "reserved_bytes": GIB,
        "free_bytes": 47 * GIB,
        "compute_capability": "8.6", "pcie_generation": 1, "pcie_generation_max": 4, "pcie_width": 16,
        "pcie_width_max": 16, "nvlinks": 2, "mig": None, "ecc": True, "ecc_errors": 3, "persistence": True,
        "compute_mode": "default", "processes": [[2**22 + 7, GIB]],
    }  # fmt: skip
    silent = card | dict.fromkeys(("ecc", "ecc_errors", "persistence", "compute_mode")) | {"processes": []}
    unread = dict.fromkeys(("memory_bytes", "reserved_bytes", "free_bytes", "nvlinks"))
    assert found == {
        "driver": "580.1",
        "cuda_driver": 13010,
        "gpus": [
            card,
            silent | {"index": 1, "uuid": "GPU-1"},
            silent | {"index": 2, "uuid": "GPU-2"} | unread,
        ],
        "links": [
            {"gpus": [0, 1], "nvlink": True, "pcie_path": "one PCIe host bridge", "peer_to_peer": "yes"},
            {"gpus": [0, 2], "nvlink": False, "pcie_path": "between NUMA nodes", "peer_to_peer": "no: chipset"},
            {"gpus": [1, 2], "nvlink": None, "pcie_path": "between NUMA nodes", "peer_to_peer": None},
        ],
    }
    bus = "PCIe 1 x16 now, at most 4 x16"
    driver = "driver 580.1, CUDA 13.1"
    wrong = f"3 uncorrected memory errors since boot; in use: process {2**22 + 7} (not visible from here, 1.0 GiB)"
    lines = check_devices(found, reason, HOST)
    full = f"NVIDIA RTX A6000; 48.0 GiB (47.0 GiB free); compute capability 8.6; {bus}; 2 NVLinks up; {driver}"
    assert lines[:-2] == [
        Check(
            "devices",
            "GPU 0",
            "warning",
            f"{full}; {wrong}",
            "nvidia-smi --gpu-reset -i 0",
        ),
        Check("devices", "GPU 1", "ok", full),
        Check(
            "devices",
            "GPU 2",
            "ok",
            f"NVIDIA RTX A6000; ? (? free); compute capability 8.6; {bus}; no NVLink; {driver}",
        ),
        Check("devices", "GPUs 0 and 1", "ok", "NVLink; peer to peer yes"),
        Check(
            "devices",
            "GPUs 0 and 2",
            "note",
            "PCIe, between NUMA nodes; peer to peer no: chipset: what they send goes through the memory of the host",
            "switch ACS and the IOMMU off in the BIOS",
        ),
        Check("devices", "GPUs 1 and 2", "ok", "PCIe, between NUMA nodes; peer to peer not known"),
    ]


CARD: dict[str, Any] = {
    "index": 1, "name": "NVIDIA H200", "uuid": "GPU-1", "memory_bytes": 139 * GIB, "reserved_bytes": GIB,
    "free_bytes": 139 * GIB, "compute_capability": "9.0", "pcie_generation": 5, "pcie_generation_max": 5,
    "pcie_width": 16, "pcie_width_max": 16, "nvlinks": 18, "mig": False, "ecc": True, "ecc_errors": 0,
    "persistence": True, "compute_mode": "default", "processes": [],
}  # fmt: skip
IDLE = CARD | {"index": 0}


@pytest.mark.parametrize(
    ("card", "others", "state", "words", "mend"),
    [
        ({}, [], "ok", "driver 580.1, CUDA ?", ""),
        ({"mig": True}, [], "warning", "MIG is on, but a run needs whole GPUs", "nvidia-smi -i 1 -mig 0"),
        ({"compute_mode": "prohibited"}, [], "warning", "prohibited: not every", "nvidia-smi -i 1 -c DEFAULT"),
        ({"ecc_errors": 2}, [], "warning", "2 uncorrected memory errors", "nvidia-smi --gpu-reset -i 1"),
        ({"processes": [[2**22 + 1, GIB]]}, [], "warning", "in use: process 4194305 (not", "kill 4194305"),
        ({"processes": [[2**22 + 1, None]]}, [IDLE], "warning", "here, ?)", "export CUDA_VISIBLE_DEVICES=0"),
        ({"free_bytes": 99 * GIB}, [], "warning", "in use: 40.0 GiB by processes that are not visible", "nvidia-smi"),
        ({"free_bytes": 99 * GIB}, [IDLE], "warning", "not visible", "export CUDA_VISIBLE_DEVICES=0"),
        ({"processes": [[7, GIB]]}, [IDLE | {"free_bytes": GIB}], "warning", "process 7 (", "kill 7"),
        ({"free_bytes": 139 * GIB - GIB // 2}, [], "ok", "", ""),
        ({"memory_bytes": None, "free_bytes": None}, [], "ok", "? (? free)", ""),
        ({"pcie_width": 8}, [], "note", "fewer PCIe lanes", "move it to a slot of x16"),
        ({"ecc": False}, [], "note", "ECC is off", "nvidia-smi -i 1 -e 1, and reboot"),
        ({"persistence": False}, [], "note", "persistence mode is off", "nvidia-smi -pm 1"),
        ({"persistence": False, "mig": True}, [], "warning", "persistence", "nvidia-smi -i 1 -mig 0"),
    ],
)
def test_what_is_wrong_with_a_card(
    card: dict[str, Any], others: list[dict[str, Any]], state: str, words: str, mend: str
) -> None:
    found = {"driver": "580.1", "cuda_driver": None, "gpus": [*others, CARD | card], "links": []}
    line = check_cards(found, "")[-1]
    assert (line.name, line.state, line.mend) == ("GPU 1", state, mend)
    assert words in line.found


@pytest.mark.parametrize(
    ("driver", "built_for", "state", "mend"),
    [
        ("580.65.06", ["13.0"], "ok", ""),
        ("550.54.14", ["13.0"], "broken", "apt-get install nvidia-driver-580-server, and reboot"),
        ("550.54.14", [], "broken", "apt-get install nvidia-driver-580-server, and reboot"),
        ("550.54.14", ["12.8"], "ok", ""),
        ("470.1", ["12.8"], "broken", "apt-get install nvidia-driver-525-server, and reboot"),
        (None, ["13.0"], "note", ""),
        ("580.1", ["11.8"], "note", ""),
    ],
)
def test_a_driver_that_is_too_old_is_said(driver: str | None, built_for: list[str], state: str, mend: str) -> None:
    line = check_cuda({"driver": driver, "gpus": [CARD]}, built_for)[0]
    assert (line.name, line.state, line.mend) == ("driver", state, mend)
    assert check_cuda({"driver": driver, "gpus": []}, built_for) == check_cuda(None, built_for) == []


def test_an_old_driver_may_be_made_to_run_newer_programs() -> None:
    found = {"driver": "550.54.14", "cuda_driver": 13000, "gpus": [CARD]}
    assert check_cuda(found, ["13.0"])[0].state == "ok"
    assert check_cuda(found | {"cuda_driver": 12080}, ["13.0"])[0].state == "broken"


@pytest.mark.parametrize(
    ("capability", "built_for", "is_old"),
    [("7.0", "13.0", True), ("7.5", "13.0", False), ("7.0", "12.8", False), (None, "13.0", False)],
)
def test_a_card_for_which_there_are_no_kernels_is_said(capability: str | None, built_for: str, is_old: bool) -> None:
    found = {"driver": "580.1", "gpus": [IDLE, CARD | {"compute_capability": capability}]}
    lines = [line for line in check_cuda(found, [built_for]) if line.name.startswith("GPU")]
    assert [(line.name, line.state, bool(line.mend)) for line in lines] == [("GPU 1", "broken", True)] * is_old


@pytest.mark.parametrize(
    ("peers", "state", "mend"),
    [
        ("yes", "ok", ""),
        ("no: GPU", "note", ""),  # disabled by the manufacturer on GeForce cards
        ("no: disabled in the registry", "note", "take NVreg_RegistryDwords out of /etc/modprobe.d, and reboot"),
        ("no: I/O hub topology", "note", "switch ACS and the IOMMU off in the BIOS"),
        (None, "ok", ""),
    ],
)
def test_cards_that_do_not_reach_each_other_are_said(peers: str | None, state: str, mend: str) -> None:
    link = {"gpus": [0, 1], "nvlink": False, "pcie_path": "one PCIe switch", "peer_to_peer": peers}
    line = check_cards({"driver": None, "cuda_driver": None, "gpus": [IDLE, CARD], "links": [link]}, "")[-1]
    assert (line.name, line.state, line.mend) == ("GPUs 0 and 1", state, mend)


def test_the_lock_is_for_a_cuda_that_the_doctor_knows() -> None:
    assert locked_cuda() in cards.LEAST_DRIVERS
    known = "".join(f"{cuda}) echo {driver} ;; " for cuda, driver in cards.LEAST_DRIVERS.items())
    assert known.strip() in (ROOT / "scripts" / "setup.sh").read_text()


@pytest.mark.parametrize(("version", "state"), [("13.0", "ok"), ("12.4", "warning"), (None, "note")])
def test_a_cuda_compiler_of_another_version(
    version: str | None, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version is not None:
        (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
        (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if version else str(tmp_path))
    line = check_cuda({"driver": "580.1", "gpus": [CARD]}, ["13.0"])[1]
    assert (line.name, line.state, bool(line.mend)) == ("nvcc", state, state == "warning")


def test_a_missing_compiler_and_missing_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cards.sysconfig, "get_path", lambda name: str(tmp_path))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert [(line.name, line.state, line.mend) for line in check_compiler()] == [
        ("C compiler", "missing", "apt-get install gcc"),
        ("Python.h", "missing", f"apt-get install python{version}-dev"),
    ]
    for name in ("clang", "Python.h"):
        (tmp_path / name).touch(0o755)
    assert [line.state for line in check_compiler()] == ["ok", "ok"]


SMI = """#!/bin/sh
echo "0, NVIDIA A100-SXM4-80GB, GPU-7, 550.54.14, 81920, 870, 80000, 8.0, 4, 4, 16, 16, Disabled, Enabled, 0, Enabled, \
Exclusive_Process"
echo "1, NVIDIA GB10, GPU-8, 550.54.14, [N/A], [N/A], [N/A], 12.1, 5, 5, 1, 1, [N/A], [N/A], [N/A], Disabled, Default"
"""


def test_before_anything_is_installed_it_needs_the_standard_library_only(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    venv.create(tmp_path / "bare", with_pip=False)
    command = [str(tmp_path / "bare" / "bin" / "python"), "-m", "launcher.doctor", "--json"]
    environ = {"PATH": f"{tmp_path}:/bin"}
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert lines["fsdp"]["state"] == "missing"
    assert "NVIDIA A100-SXM4-80GB; 79.2 GiB (78.1 GiB free); compute capability 8.0" in lines["GPU 0"]["found"]
    assert (lines["GPU 0"]["state"], lines["GPU 0"]["mend"]) == ("warning", "nvidia-smi -i 0 -c DEFAULT")
    assert (lines["GPU 1"]["state"], lines["GPU 1"]["mend"]) == ("note", "nvidia-smi -pm 1")
    assert lines["driver"]["state"] == "broken"


HOST = Host(
    cpu="AMD EPYC", cores=8, instructions=("avx2",), numa_nodes=2, memory_bytes=64 * GIB,
    memory_available_bytes=32 * GIB, memory_limit_bytes=16 * GIB, shared_memory_bytes=64 * 1024**2,
    shared_memory_free_bytes=64 * 1024**2, locked_memory_bytes=8 * 1024**2, infiniband=("mlx5_0",),
)  # fmt: skip
NOBODY = Host(None, 1, (), None, None, None, None, None, None, None, ())


def test_machine_without_a_driver() -> None:
    gpus = Check("devices", "GPUs", "note", "none: no driver")
    assert check_devices(None, "no driver", HOST) == [
        gpus,
        Check("devices", "processor", "ok", "AMD EPYC; 8 cores for this process; 2 NUMA nodes; avx2"),
        Check("devices", "memory", "ok", "64.0 GiB, 32.0 GiB available; this container may use 16.0 GiB"),
    ]
    assert check_devices(None, "no driver", NOBODY)[-1] == Check("devices", "memory", "ok", "?, ? available")


@pytest.mark.parametrize(
    ("machine", "states"),
    [
        (HOST, {"/dev/shm": "warning", "locked memory": "warning", "InfiniBand": "note"}),
        (
            replace(HOST, shared_memory_bytes=GIB, locked_memory_bytes=None),
            {"/dev/shm": "ok", "locked memory": "ok", "InfiniBand": "note"},
        ),
        (replace(HOST, infiniband=()), {"/dev/shm": "warning", "locked memory": "ok", "InfiniBand": "note"}),
        (NOBODY, {"/dev/shm": "warning", "locked memory": "ok", "InfiniBand": "note"}),
    ],
)
def test_limits_of_the_system(machine: Host, states: dict[str, str]) -> None:
    found = {check.name: check for check in check_system(machine)}
    assert {name: found[name].state for name in states} == states
    assert all(bool(check.mend) == (check.state in ("warning", "missing")) for check in found.values())


def test_this_machine_is_described() -> None:
    machine = describe()
    assert machine.cores >= 1
    assert machine.memory_bytes == psutil.virtual_memory().total
    assert machine.shared_memory_bytes == psutil.disk_usage("/dev/shm").total


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_devices({}), reason="no CUDA device")
def test_real_cards() -> None:
    found, reason = nvml()
    assert (reason, bool(found and found["gpus"])) == ("", True)


def test_trial_that_ends_by_itself() -> None:
    ended: Ended = attempt("launcher.doctor.no_such_module", (), 30)
    assert (ended.out, ended.code) == ([], 1)
    assert "no_such_module" in ended.last_words

"""`tlx submit`: the script it writes, what it looks at before, and what it says to Slurm, which here only notes it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import write_config
from composed import claimed
from hypothesis import given, settings
from hypothesis import strategies as st
from images import make_shards
from places import ROOT
from typer.testing import CliRunner

from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.plan.config import dump
from tlx.plan.config import load as load_config
from tlx.runs.run_folder import RunFolder
from tlx.runs.run_lock import RunLock
from tlx.submit import checks, slurm, submission, template, times
from tlx.submit import job as jobs
from tlx.submit import site as sites
from tlx.submit.job import SubmitOptions
from tlx.submit.script import script
from tlx.submit.site import Site
from tlx.submit.template import MARKER, Template

REAL = Template.read(ROOT / "slurm" / "train.sbatch")
TOY = Template(
    {"job-name": "tlx", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "2", "cpus-per-task": "16"}
    | {"time": "12:00:00", "signal": "B:USR1@180", "requeue": None, "output": "%x-%j.out"},
    {"PYTHON": ': "${PYTHON:=python3}"', "MAX_TRIES": ': "${MAX_TRIES:=3}" # tries'},
    f"{MARKER}\nsrun true\n",
)


def made(asked=None, site=None, run="/r/a", base=TOY):
    return jobs.make(asked or SubmitOptions(), site or Site(python="python"), base, Path(run))


# -- the script


def test_a_script_reads_like_this():
    site = Site(
        partition="gpu",
        account="my project",
        qos="short",
        memory="480G",
        gpus_per_node=4,
        gpu_type="a100",
        modules=["cuda/12", "gcc"],
        setup="export NCCL_SOCKET_IFNAME=ib0\nulimit -l unlimited",
        container="apptainer exec --nv $SCRATCH/i.sif",
        srun="--cpu-bind=cores --container-mounts=/data:/data",
        options=["--exclusive", "--mail-type=END"],
    )
    sbatch = ("--mail-type=FAIL", "--qos=long", "--signal=B:USR1@300")
    asked = SubmitOptions(gpus=8, time="1d6h", stage="$TMPDIR/x", sbatch=sbatch)
    job = made(asked, site, "/r/o'neil")
    assert script(job, TOY, ["tlx", "submit", "c.yaml", "data.train=http://u:p@h/t?k=v"]) == (
        "#!/bin/bash\n"
        "# Written by: tlx submit c.yaml data.train=http://h/t\n"
        "# 2 nodes x 4 GPUs = 8 ranks by torchrun, 8 CPUs to each, 1-06:00:00 at a time\n"
        '#SBATCH --job-name="o\\\'neil"\n'
        "#SBATCH --nodes=2\n"
        "#SBATCH --ntasks-per-node=1\n"
        "#SBATCH --gpus-per-node=a100:4\n"
        "#SBATCH --cpus-per-task=32\n"
        "#SBATCH --time=1-06:00:00\n"
        "#SBATCH --signal=B:USR1@300\n"
        "#SBATCH --requeue\n"
        '#SBATCH --output="/r/o\\\'neil/slurm/%j.out"\n'
        "#SBATCH --mem=480G\n"
        "#SBATCH --partition=gpu\n"
        '#SBATCH --account="my project"\n'
        "#SBATCH --qos=long\n"
        '#SBATCH --comment="tlx:/r/o\\\'neil"\n'
        "#SBATCH --exclusive\n"
        "#SBATCH --mail-type=FAIL\n"
        "\n"
        "module load cuda/12 gcc || exit 1\n"
        "export NCCL_SOCKET_IFNAME=ib0\n"
        "ulimit -l unlimited\n"
        "LAUNCHER=torchrun\n"
        'PYTHON="apptainer exec --nv $SCRATCH/i.sif python3"\n'
        "TLX_RUN='/r/o'\"'\"'neil'\n"
        "RANKS_PER_NODE=4\n"
        'STAGE="$TMPDIR/x"\n'
        "SRUN_OPTIONS='--cpu-bind=cores --container-mounts=/data:/data'\n"
        "CHAIN=yes\n"
        ': "${MAX_TRIES:=3}" # tries\n'
        "\n"
        f"{MARKER}\nsrun true\n"
    )


def test_the_real_script_is_whole(tmp_path):
    """What slurm/train.sbatch says itself stays, except for the values of this job; shells accept it."""
    job = made(SubmitOptions(nodes=2, gpus=8, stage="$TMPDIR"), Site(), base=REAL)
    text = script(job, REAL, ["tlx", "submit"])
    given, kept = (ROOT / "slurm" / "train.sbatch").read_text(), {"--requeue", "--open-mode=append"}
    assert text.endswith(given[given.index(MARKER) :])
    assert kept <= {line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")}
    body = given[given.index(MARKER) :]
    for name in job.settings:  # the script must know what it is told
        assert re.search(rf"\$(?:{name}\b|\{{{name}\b)", body), name
    for name in re.findall(r': "\$\{([A-Z_]+):=', given):  # every setting of the head is in it, once
        assert len(re.findall(rf'^(?:{name}=|: "\${{{name}:=)', text, flags=re.MULTILINE)) == 1
    file = tmp_path / "s.sbatch"
    file.write_text(text)
    assert subprocess.run(["bash", "-n", file], capture_output=True, check=False).returncode == 0
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", "--severity=warning", file], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


TEXT = st.text(st.characters(exclude_categories=()), min_size=1, max_size=30) | st.text(
    "ab $`'\"\\#;&|\n\r\x85\u2028!(){}<>*?%=~-", min_size=1, max_size=30
)


def read_by_sbatch(line):
    """The value of a #SBATCH line, as sbatch 22.05 was seen to read it: quotes, in them a backslash, # elsewhere."""
    found, quote, at = "", "", line.index("=") + 1
    while at < len(line):
        c = line[at]
        if c == "\\":
            at += 1
            found += line[at]
        elif quote and c == quote:
            quote = ""
        elif not quote and c in "\"'":
            quote = c
        else:
            assert quote or not (c.isspace() or c == "#"), "it ends here"
            found += c
        at += 1
    assert not quote
    return found


@settings(max_examples=80, deadline=None)
@given(run=TEXT, name=TEXT, account=TEXT, stage=TEXT, option=TEXT, word=TEXT)
def test_no_text_can_leave_its_line(run, name, account, stage, option, word):
    """Each text is refused, or stands in the script as one value; sbatch and the shell read nothing else of it."""
    sbatch = (f"--job-name={name}", f"--account={account}", f"--comment2={option}")
    try:
        job = made(SubmitOptions(stage=stage, sbatch=sbatch), run=f"/r/{run}")
    except UserError:
        return
    lines = script(job, TOY, ["tlx", "submit", f"run={word}"]).split("\n")
    assert len(lines) == 9 + len(job.settings) + len(job.options)
    assert not any(c in line for line in lines for c in "\r\x0b\x0c\x85\u2028\u2029")
    directives = dict(line[10:].split("=", 1) for line in lines if line.startswith("#SBATCH") and "=" in line)
    assert [i for i, line in enumerate(lines) if line.startswith("#SBATCH")] == [*range(3, 3 + len(job.options))]
    read = {key: read_by_sbatch(f"={value}") for key, value in directives.items()}
    assert (read["job-name"], read["account"], read["comment2"]) == (name, account, option)
    assert read["comment"] == f"tlx:{Path('/r') / run}"


@settings(max_examples=20, deadline=None)
@given(run=TEXT, stage=TEXT)
def test_the_shell_reads_what_was_meant(run, stage):
    try:
        job = made(SubmitOptions(stage=stage), run=f"/r/{run}")
    except UserError:
        return
    head = script(job, TOY, ["tlx"]).partition(MARKER)[0]
    show = f'{head}\nprintf \'%s\\0\' "$TLX_RUN" "$STAGE"'
    said = subprocess.run(["bash", "-u"], input=show, env={}, capture_output=True, text=True, check=False)
    if re.search(r"\$(\w|\{\w)", stage):  # a variable; here there is none, and a job would say so
        assert "unbound variable" in said.stderr or not said.stderr
    else:
        assert said.stdout.split("\0") == [str(job.run), stage, ""], said.stderr


def test_variables_are_those_of_the_job_and_nothing_else_is_expanded():
    stage = '$TMPDIR/${USER}/`id`/$(id)/"x"\\$HOME`id`'
    head = script(made(SubmitOptions(stage=stage)), TOY, ["tlx"]).partition(MARKER)[0]
    said = subprocess.run(
        ["bash", "-u"], input=f'{head}\nprintf %s "$STAGE"', env={"TMPDIR": "/t", "USER": "u", "HOME": "/h"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout == '/t/u/`id`/$(id)/"x"\\/h`id`'


# -- what is asked for


@pytest.mark.parametrize(
    ("asked", "site", "shape"),  # nodes, GPUs of a node, ranks of a node, CPUs of a node
    [
        ({}, {}, (1, 2, 2, 16)),
        ({"nodes": 2, "gpus": 8}, {}, (2, 4, 4, 32)),
        ({"gpus": 8}, {"gpus_per_node": 4, "cpus_per_gpu": 3}, (2, 4, 4, 12)),
        ({"gpus": 2}, {"gpus_per_node": 4}, (1, 2, 2, 16)),
        ({"nodes": 3}, {"gpus_per_node": 4}, (3, 4, 4, 32)),
        ({"nodes": 3, "sbatch": ("--gpus-per-node=a:1",)}, {"gpus_per_node": 4}, (3, 1, 1, 8)),
        (
            {"nodes": 2, "gpus": 0, "ranks_per_node": 3, "sbatch": ("--cpus-per-gpu=5",)},
            {"gpus_per_node": 4},
            (2, 0, 3, 15),
        ),
    ],
)
def test_gpus_are_of_the_whole_job(asked, site, shape):
    job = made(SubmitOptions(**asked), Site(**site, python="python"))
    assert (job.nodes, job.gpus, job.ranks, job.cpus) == shape
    assert (job.options.get("gpus-per-node") or "0").rpartition(":")[2] == str(shape[1])
    assert (job.options["cpus-per-task"], job.settings["RANKS_PER_NODE"]) == (str(shape[3]), str(shape[2]))
    assert f"= {shape[0] * shape[2]} rank" in str(job)


@pytest.mark.parametrize(
    ("asked", "site", "said"),
    [
        ({"nodes": 2, "gpus": 3}, {}, "3 GPUs do not divide by 2 nodes\n  -> .*--gpus 4"),
        ({"nodes": 2, "gpus": 4, "sbatch": ("--gpus-per-node=4",)}, {}, "are 8, not 4"),
        ({"nodes": 1, "gpus": 8}, {"gpus_per_node": 4}, "a node has 4 GPUs .* not 8\n  -> --nodes 2"),
        ({"gpus": 4, "ranks_per_node": 2}, {}, "--ranks-per-node"),
        ({"time": "soon"}, {}, "--time: 'soon' is not a time limit"),
        ({"time": "2m"}, {}, "a warning 180 s before a limit of 00:02:00"),
        ({"sbatch": ("--signal=USR1",)}, {}, "--signal is not for tlx submit to hand on"),
        ({"sbatch": ("--gres=nvme:1,gpu:3",)}, {}, "gpu_type in the site file"),
        ({"sbatch": ("--gres=gpu",)}, {}, "gpu_type in the site file"),
        ({"sbatch": ("--gpus-per-task=1",)}, {}, "each node runs one launcher"),
        ({"sbatch": ("--gpu-bind=single:1",)}, {}, "each launcher gets all GPUs of its node"),
        ({"sbatch": ("--signal=B:USR1@50000",)}, {}, "a warning 50000 s before a limit of 12:00:00"),
        ({"sbatch": ("--cpus-per-gpu=many",)}, {}, "'many': one number"),
        ({"sbatch": ("--cpus-per-g=4",)}, {}, "write its name in full"),
        ({"sbatch": ("--signa=USR1",)}, {}, "--signal is not for tlx"),  # sbatch takes abbreviations
        ({"sbatch": ("--no-req",)}, {}, "--no-requeue is not for tlx"),
        ({"sbatch": ("--clusters=b",)}, {}, "--clusters is not for tlx"),
        ({"sbatch": ("--dry-run",)}, {}, "it stands before the --"),
        ({"sbatch": ("--part=b",)}, {"partition": "a"}, "--part: its name in full is needed\n  -> --partition"),
        ({"stage": "~/x"}, {}, r"--stage: '~/x': ~ does nothing here; write \$HOME"),
        ({"sbatch": ("--job-name=a\nb",)}, {}, r"--job-name: 'a\\nb' cannot stand in one line"),
    ],
)
def test_what_cannot_be_asked_for(asked, site, said):
    with pytest.raises(UserError, match=said):
        made(SubmitOptions(**asked), Site(**site, python="python"))


def test_options_whose_names_only_begin_alike_are_free():
    options = ("--export=ALL", "--mem-bind=local", "--wait-all-nodes=1", "--nodelist=n1")
    assert options == tuple(f"--{k}={v}" for k, v in list(made(SubmitOptions(sbatch=options)).options.items())[-4:])


@pytest.mark.parametrize(
    ("options", "made"),  # of the job's own options: --gpus-per-node=2, --cpus-per-task=16, --signal=B:USR1@180
    [
        (["--gres=nvme:1"], {"gres": "nvme:1", "gpus-per-node": "2"}),
        (["--gres=gpu:2"], {"gres": "gpu:2", "gpus-per-node": None}),
        (["--gres=gpu:a100:2,nvme:1"], {"gres": "gpu:a100:2,nvme:1", "gpus-per-node": None}),
        (["--cpus-per-gpu=3"], {"cpus-per-task": "6", "cpus-per-gpu": None}),
        (["--signal=B:USR1@600"], {"signal": "B:USR1@600"}),
        (["--requeue", "--ntasks-per-node=1", "--gpus-per-node=2"], {"gpus-per-node": "2", "ntasks-per-node": "1"}),
        (["--mem=80G"], {"mem": "80G"}),
        (["--job-name=b", "--partition=p"], {"job-name": "b", "partition": "p"}),
        (["--gpus-per-node=a100:4"], {"gpus-per-node": "a100:4", "cpus-per-task": "32"}),
        (["--mem-per-cpu=4G"], {"mem-per-cpu": "4G", "mem": None}),
    ],
)
def test_options_are_judged_by_what_they_ask_for(options, made):
    job = jobs.make(SubmitOptions(sbatch=tuple(options)), Site(python="python", memory="9G"), TOY, Path("/r/a"))
    assert {key: job.options.get(key) for key in made} == made


def test_the_sites_type_of_gpu_is_kept():
    options = made(SubmitOptions(sbatch=("--gpus-per-node=4",)), Site(gpu_type="a100", python="python")).options
    assert options["gpus-per-node"] == "a100:4"


@pytest.mark.parametrize("signal", [None, "USR1"])
def test_a_script_without_the_signal_that_checkpoints_rest_on(signal):
    options = {name: value for name, value in TOY.options.items() if name != "signal"}
    changed = replace(TOY, options=options | ({"signal": signal} if signal else {}))
    with pytest.raises(UserError, match="--signal: a signal such as B:USR1@180 is needed"):
        jobs.make(SubmitOptions(), Site(python="python"), changed, Path("/r/a"))


def test_what_is_said_by_nobody_fits_the_nodes():
    """slurm/train.sbatch's 8 CPUs to a rank are a default: nodes may have fewer."""
    plain = SubmitOptions(gpus=2)
    for cpus, each in ((None, 8), (64, 8), (16, 8), (6, 3), (1, 1)):
        job = jobs.make(plain, Site(python="python"), TOY, Path("/r/a"), node_cpus=lambda _, cpus=cpus: cpus)
        assert job.options["cpus-per-task"] == str(2 * each), cpus
    asked = SubmitOptions(gpus=2, sbatch=("--cpus-per-gpu=8",))
    said = jobs.make(asked, Site(python="python"), TOY, Path("/r/a"), node_cpus=lambda _: 4)
    assert said.options["cpus-per-task"] == "16"  # asked for: Slurm refuses it


def test_a_single_rank_is_one_rank():
    assert str(made(SubmitOptions(gpus=0))).startswith("1 node x 1 rank on CPUs = 1 rank by")


@pytest.mark.parametrize("run", ["/r/100%", "/r/a\\b", "/r/a\nb", "/r/\udce9"])
def test_folders_that_slurm_cannot_write_logs_to(run):
    with pytest.raises(UserError, match="Slurm cannot write logs"):
        made(run=run)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *[("12h", 43200), ("1d6h", 108000), ("90s", 90), ("90", 5400), ("90:30", 5430), ("12:00:00", 43200)],
        *[("1-0", 86400), ("1-6", 108000), ("1-06:30", 109800), ("1-06:00:01", 108001)],
    ],
)
def test_times(text, count):
    assert times.read(text) == count
    assert times.read(times.written(count)) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "1-", "1:2:3:4", "UNLIMITED", "\u0661", "1 2h"])
def test_no_times(text):
    with pytest.raises(ValueError, match="time"):
        times.read(text)
    assert times.limit("UNLIMITED") is None
    for said in ("0", "N/A", "00:00:00"):  # partitions that nobody may use have such limits
        assert times.limit(said) is None


# -- the site file


def test_the_example_is_valid_as_it_is_and_with_every_line():
    file = ROOT / "slurm" / "site.yaml"
    assert sites.load(file) == Site()
    keys = re.sub(r"(?m)^# (?=(\w+:|  - ))", "", file.read_text())
    assert set(yaml.safe_load(keys)) == set(Site.model_fields)
    site = Site.model_validate(yaml.safe_load(keys))
    assert site.setup[0] == "export NCCL_SOCKET_IFNAME=ib0"
    assert site.container == ("apptainer", "exec", "--nv", "/shared/tlx.sif")


def test_a_time_in_slurms_form_needs_no_quotes(tmp_path):
    """YAML 1.1 made 43200 of it."""
    (tmp_path / "s.yaml").write_text("time: 12:00:00\n")
    assert times.read(sites.load(tmp_path / "s.yaml").time) == 12 * 3600


def test_all_mistakes_of_a_site_file_together(tmp_path):
    raw = {"partitoin": "gpu", "time": 43200, "gpus_per_node": 0, "options": ["-p gpu"], "container": "run 'a b'"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**raw, "account": "a\nb", "launcher": "mpirun"}))
    with pytest.raises(UserError) as caught:
        sites.load(tmp_path / "s.yaml")
    for said in (
        'partitoin: unknown key; did you mean "partition"', "time: a time is written with its unit", "gpus_per_node: ",
        "options.0: '-p gpu' is not an option of sbatch", "container: 'a b': a word with spaces",
        "account: has characters that cannot be printed", "launcher: ",
    ):  # fmt: skip
        assert said in str(caught.value)


def test_one_word_is_a_list_of_one_and_a_tilde_is_refused(tmp_path):
    site = Site(modules="cuda/12", options="--exclusive")
    assert (site.modules, site.options) == (("cuda/12",), ("--exclusive",))
    assert Site(modules="cuda/12 gcc").modules == ("cuda/12", "gcc")
    (tmp_path / "s.yaml").write_text("stage: ~/x\npython: ~/p\ncontainer: apptainer exec ~/i\nsrun: [--chdir=~/x]")
    with pytest.raises(UserError) as caught:
        sites.load(tmp_path / "s.yaml")
    for said in ("stage: '~/x': ~", "python: '~/p': ~", "container: '~/i': ~", "srun: '--chdir=~/x': ~"):
        assert said in str(caught.value)


def test_where_a_site_file_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TLX_SITE", raising=False)
    assert sites.find(None) == (Site(), None)
    for place, text in (
        (".config/tlx/site.yaml", "qos: home"), ("slurm/site.yaml", "# as it comes"), ("e.yaml", "qos: variable"),
        ("o.yaml", "qos: option"),
    ):  # fmt: skip
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    assert sites.find(None)[0].qos == "home"
    (tmp_path / "slurm/site.yaml").write_text("qos: here")
    assert sites.find(None) == (Site(qos="here"), Path("slurm/site.yaml"))
    monkeypatch.setenv("TLX_SITE", "~/e.yaml")
    assert sites.find(None)[0].qos == "variable"
    assert sites.find(Path("o.yaml"))[0].qos == "option"
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot be read"):
        sites.find(Path("nowhere.yaml"))


def test_the_command_line_before_the_site_before_the_template():
    site = Site(partition="s", qos="s", time="2h", launcher="srun", cpus_per_gpu=2, stage="/s", python="p")
    job = made(
        SubmitOptions(time="3h", stage="/w", launcher="accelerate", sbatch=("--partition=w", "--cpus-per-gpu=1")),
        site,
    )
    assert [job.options[k] for k in ("partition", "qos", "time", "cpus-per-task")] == ["w", "s", "03:00:00", "2"]
    assert (job.settings["STAGE"], job.settings["LAUNCHER"], job.settings["PYTHON"]) == ("/w", "accelerate", "p")
    job = made(SubmitOptions(), site)
    assert (job.options["time"], job.settings["STAGE"], job.launcher) == ("02:00:00", "/s", "srun")
    job = made(SubmitOptions(), Site())
    assert (job.options["time"], job.settings["PYTHON"]) == ("12:00:00", sys.executable)
    assert not {"partition", "mem"} & set(job.options)


def test_the_template_is_found_where_a_wheel_puts_it(tmp_path, monkeypatch):
    assert template.locate() == ROOT / "slurm" / "train.sbatch"
    monkeypatch.setattr(template, "__file__", str(tmp_path / "lib" / "tlx" / "submit" / "template.py"))
    monkeypatch.setattr(template.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=r"there is no train.sbatch in .*share/tlx/slurm"):
        template.locate()
    (tmp_path / "share/tlx/slurm").mkdir(parents=True)
    (tmp_path / "share/tlx/slurm/train.sbatch").touch()
    assert template.locate() == tmp_path / "share/tlx/slurm/train.sbatch"


# -- with commands of Slurm that only note what they are told

FAKE = r"""#!/bin/bash
printf '%s\0' "${0##*/}" "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls"
case ${0##*/} in
squeue)
    [ ! -e "$FAKE/unset" ] || { echo "squeue: fatal: Could not establish a configuration source" >&2; exit 1; }
    cat "$FAKE/queue" ;;
sinfo) cat "$FAKE/nodes" ;;
scontrol) cat "$FAKE/partitions" ;;
sbatch)
    env >"$FAKE/env"
    if [ "$1" = --test-only ]; then
        cat >"$FAKE/tried"; cat "$FAKE/answer" >&2; [ ! -e "$FAKE/refuses" ]
    else
        [ -e "$FAKE/sleeps" ] && exec sleep 60
        [ -e "$FAKE/refuses_it" ] && { echo "sbatch: error: Batch job submission failed: Invalid qos" >&2; exit 1; }
        echo "a line of the site's plugin"; cat "$FAKE/id"
    fi ;;
esac
"""
PARTITIONS = """PartitionName=short Default=YES MaxTime=01:00:00 State=UP
PartitionName=long Default=NO MaxTime=7-00:00:00 State=UP
"""


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in ("sbatch", "squeue", "scontrol", "sinfo"):
            (folder / "bin" / name).write_text(FAKE)
            (folder / "bin" / name).chmod(0o755)
        self.say(queue="", partitions=PARTITIONS, id="4711;here\n", answer="sbatch: Job 7 to start at noon on n[1-2]\n")

    def say(self, **texts: str) -> None:
        for name, text in texts.items():
            (self.folder / name).write_text(text)

    def calls(self, name: str) -> list[list[str]]:
        file = self.folder / "calls"
        rows = file.read_text().split("\0\n")[:-1] if file.exists() else []
        return [words[1:] for words in (row.split("\0") for row in rows) if words[0] == name]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 10, "val": 5}, size=24)


@pytest.fixture
def here(tmp_path, monkeypatch, shards):
    """A working folder with c.yaml, without a site file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TLX_SITE", raising=False)
    monkeypatch.setattr(sys, "argv", ["tlx", "submit", "c.yaml"])
    raw = {
        "run": "runs/a",
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 16, "workers": 1},
        "input": {"size": 16},
        "backbone": {"name": "toys:small", "weights": "none", "args": {"norm": "group"}},
        "phases": {"each": {"lr": 0.01, "duration": "4ep"}},
    }
    write_config(tmp_path / "c.yaml", raw)
    return tmp_path


@pytest.fixture
def cluster(here, monkeypatch):
    made = Cluster(here / "cluster")
    monkeypatch.setenv("FAKE", str(made.folder))
    monkeypatch.setenv("PATH", f"{made.folder / 'bin'}:/usr/bin:/bin")
    return made


def submit(*words, gpus="4", time="1h"):
    words = ("c.yaml", "--nodes", "2", "--gpus", gpus, "--time", time, *words)
    return CliRunner().invoke(app, ["submit", *map(str, words)])


def refused(*words, **more):
    done = submit(*words, **more)
    assert isinstance(done.exception, UserError), done.output
    assert not (Path("runs/a") / "slurm").exists()
    return str(done.exception)


def test_a_job_is_checked_shown_kept_and_queued(cluster, here, monkeypatch):
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "3")  # of a job that this shell runs in
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    done = submit("seed=1", "data.sampling.limit=8", "--", "--mail-type", "END")
    assert done.exit_code == 0, (done.output, done.exception)
    kept = here / "runs/a/slurm/submitted-1.sbatch"
    for said in (
        "2 nodes x 2 GPUs = 4 ranks by torchrun, 8 CPUs to each, 01:00:00 at a time",
        "24 training samples, global batch 16, 4 on a rank, 2 steps per epoch",
        "feature_extraction 4 epochs (8 steps); fine_tuning 4 epochs (8 steps)",
        "to start at noon on n[1-2]", "submitted: job 4711\n", str(kept), "squeue -j 4711 ",
        f"tail -F {here}/runs/a/slurm/4711.out", f"tlx status {here}/runs/a", "scancel --batch -s USR1 4711",
    ):  # fmt: skip
        assert said in done.output, said
    assert "warning" not in done.output
    tried, sent = cluster.calls("sbatch")
    assert tried == ["--test-only"]
    frozen = kept.with_suffix(".yaml")  # as it is now: an edit of c.yaml is not for a job that waits
    assert sent == ["--parsable", str(kept), str(frozen)]
    assert frozen.read_text() == dump(load_config("c.yaml", ["seed=1", "data.sampling.limit=8"]))
    text = kept.read_text()
    assert f"\n{text.partition(MARKER)[0]}\nscript: " in done.output
    assert (here / "cluster/tried").read_text() == text
    assert cluster.calls("squeue") == [[f"--user={os.getuid()}", "--noheader", "--format=%i|%T|%k"]]
    assert f"#SBATCH --comment=tlx:{here}/runs/a\n" in text
    assert "#SBATCH --mail-type=END\n" in text
    said = (here / "cluster/env").read_text()
    assert "SBATCH_TIMELIMIT" not in said  # else sbatch would take it in place of the script's
    assert "SBATCH_ACCOUNT=mine" in said  # the script has none
    assert "SLURM_" not in said
    assert "submitted-2.sbatch" in submit("seed=1").output
    assert kept.read_text() == text


def test_a_dry_run_needs_no_slurm_and_leaves_nothing(here, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = submit("--dry-run", "seed=1", "--fresh")
    assert done.exit_code == 0, (done.output, done.exception)
    sent = f"{here}/runs/a/slurm/submitted-N.sbatch {here}/runs/a/slurm/submitted-N.yaml --fresh"
    assert f"\n# sbatch {sent}\n#!/bin/bash\n# Written by: tlx submit c.yaml\n" in done.output
    assert done.output.endswith(REAL.body)
    assert "there is no sbatch on this machine\n" in refused()
    assert not (here / "runs").exists()
    assert "data.batch=3 cannot be split across 4 ranks" in refused("--dry-run", "data.batch=3")
    assert "Examples:\n  tlx submit " in CliRunner().invoke(app, ["submit", "--help"]).output.replace("\n    ", "\n  ")


def test_every_problem_at_once(cluster, here):
    said = refused(
        "data.train=nowhere", "world.size=8", "world.device=cuda", "backbone.weights=w.pth",
        "data.expected={classes: 3, train: 3}", "--", "--partition", "lang", gpus="0",
    )  # fmt: skip
    for problem in (
        "not submitted, 5 problems:",
        "  - nowhere: ", "w.pth: no such file", "expects 8 ranks, the job has 2\n      -> world.size=2",
        "world.device: cuda is asked for, and the job has no GPUs",
        '--partition: there is no partition "lang"; did you mean "long"?',
    ):  # fmt: skip
        assert problem in said
    assert len(cluster.calls("sbatch")) == 0
    both = refused("data.bach=3", "run=a%", "phases.each.lr=-1", "--site", "s.yaml", "--launcher", "torchrun")
    assert "data.bach: unknown key" in both
    assert "phases.each.lr" in both
    assert "s.yaml: cannot be read" in both


@pytest.mark.parametrize(
    ("words", "gpus", "said"),
    [
        (["data.batch=3"], "4", "data.batch=3 cannot be split across 4 ranks"),
        (["data.batch=2", "backbone.args.norm=batch"], "2", "micro-batches of one sample"),
        (["evaluate.metric=val/top9"], "4", "no metric"),
        (["phases.head.lr=1"], "4", 'there is no phase "head"'),
        (["--time", "2h"], "4", "more than partition short allows .01:00:00.\n .*long"),
        (["--time", "8d", "--", "--partition", "short,long"], "4", "allows .7-00:00:00.\n"),
    ],
)
def test_what_is_refused(cluster, words, gpus, said):
    assert re.search(said, refused(*words, gpus=gpus))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.batch=18"], "some take 5 samples, others 4 and wait; 16 or 20 would be even"),
        (["data.batch=20", "loop.micro_batch=2"], "5 samples become 3 micro-batches that are not alike"),
        (["data.workers=9"], "want 10 CPUs, a rank has 8: --cpus-per-gpu=10 for sbatch, or data.workers=7"),
        (["stop_after=1h"], "stop_after (01:00:00) is not shorter than the job (01:00:00)"),
        (["backbone.args.norm=batch", "data.drop_last=true"], "BatchNorm statistics move"),
        (["run=runs/http://u:p@h"], "run: everybody on the cluster can read"),
    ],
)
def test_what_is_warned_about(cluster, words, said):
    done = submit(*words, "--dry-run")
    assert done.exit_code == 0, (done.output, done.exception)
    assert said in done.output
    assert done.output.count("warning: ") == 1


def test_folders_that_a_run_cannot_go_on_in(cluster, here):
    run = here / "runs/a"
    run.mkdir(parents=True)
    lock = RunLock.take(run)
    assert f"a training runs in this folder: process {json.loads((run / '.lock').read_text())['pid']}" in refused()
    lock.release()
    (run / "config.yaml").write_text(dump(load_config(here / "c.yaml", ["seed=5"])))
    assert "another configuration:\n        seed" in refused()
    assert "this run was started" in refused("--dry-run")
    assert submit("--fresh", "--dry-run").exit_code == 0
    cluster.say(queue=f"12_[0-3]|PENDING|tlx:{run}\n13|RUNNING|tlx:{run}2\n14|RUNNING|(null)\n")
    assert "job 12_[0-3] is for the same run, and pending\n      -> wait for it, scancel 12_[0-3]" in refused("--fresh")
    assert "13" not in refused("--fresh")
    shutil.rmtree(run)
    (here / "runs").rmdir()
    (here / "runs").touch()
    assert f"{here}/runs: cannot be written: Not a directory" in refused()


def test_a_run_that_is_done_is_not_submitted(cluster, here):
    (here / "runs/a").mkdir(parents=True)
    (here / "runs/a/result.json").write_text('{"finished": true}')
    done = submit("data.train=nowhere")
    assert (done.exit_code, cluster.calls("sbatch")) == (0, [])
    assert "runs/a is done: nothing is submitted" in done.output
    (here / "runs/a/config.yaml").write_text(dump(load_config(here / "c.yaml", ["seed=5"])))
    assert "another configuration:\n        seed" in refused()
    assert "submitted: job" in submit("--fresh").output
    assert cluster.calls("sbatch")[-1][2:] == [str(here / "runs/a/slurm/submitted-1.yaml"), "--fresh"]


def test_a_run_that_is_done_is_submitted_to_be_extended(cluster, here):
    (here / "runs/a").mkdir(parents=True)
    assert "there is no run to extend" in str(submit("--extend").exception)
    (here / "runs/a/config.yaml").write_text(dump(load_config(here / "c.yaml")))
    (here / "runs/a/result.json").write_text('{"finished": true}')
    assert "these settings are of the whole training:\n        seed: 0 -> 5" in refused("--extend", "seed=5")
    assert "nothing is submitted" in submit("--extend").output
    assert cluster.calls("sbatch") == []
    assert "submitted: job" in submit("--extend", "further.more.duration=2ep").output
    assert cluster.calls("sbatch")[-1][2:] == [str(here / "runs/a/slurm/submitted-1.yaml"), "--extend"]
    assert "one of the two" in str(submit("--extend", "--fresh").exception)
    assert json.loads((here / "runs/a/result.json").read_text()) == {"finished": True}


def test_slurms_own_words(cluster, here, monkeypatch):
    (here / "cluster/refuses").touch()
    cluster.say(answer="sbatch: error: Batch job submission failed: Invalid account or account/partition combination\n")
    said = refused()
    assert "sbatch: error: Batch job submission failed: Invalid account" in said
    assert "-> -- --account=NAME, or account in the site file" in said
    cluster.say(answer="allocation failure: Requested nodes are busy\n")  # sbatch itself would let it wait
    assert "it would wait: sbatch: allocation failure: Requested nodes are busy\n\n#!/bin/bash\n" in submit().output
    (here / "cluster/refuses").unlink()
    shutil.rmtree(here / "runs")
    (here / "cluster/refuses_it").touch()  # what --test-only had nothing against
    done = submit()
    assert "sbatch: error: Batch job submission failed: Invalid qos" in str(done.exception)
    assert not list((here / "runs/a/slurm").iterdir())
    (here / "cluster/refuses_it").unlink()
    cluster.say(id="")
    assert "sbatch has printed no job id: a line of the site's plugin" in str(submit().exception)
    kept = (here / "runs/a/slurm").glob("*.sbatch")
    assert [file.name for file in kept] == ["submitted-1.sbatch"]  # it may be running
    (here / "cluster/sleeps").touch()
    monkeypatch.setattr(slurm, "PATIENCE_S", 0.2)
    with pytest.raises(slurm.Unsure, match=r"sbatch has not answered for 0.2 s; the job may be queued all the same"):
        slurm.queued(["x.sbatch"], {})


def test_partitions_of_the_environment_and_limits_that_a_qos_may_lift(cluster, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "long")  # which sbatch heeds
    assert submit("--time", "2h", "--dry-run").exit_code == 0
    monkeypatch.setenv("SBATCH_PARTITION", "lang")
    assert 'SBATCH_PARTITION: there is no partition "lang"' in refused()
    monkeypatch.delenv("SBATCH_PARTITION")
    done = submit("--time", "2h", "--dry-run", "--", "--qos=big")
    assert done.exit_code == 0
    assert "short allows (01:00:00), unless the qos allows more" in done.output
    cluster.say(partitions="PartitionName=p Default=YES MaxTime=0 State=UP\nPartitionName=q MaxTime=N/A State=UP\n")
    assert submit("--dry-run").exit_code == 0


def test_a_job_waits_for_nodes_that_are_down(cluster, here):
    """Slurm has the same words for nodes that are down and for nodes that nobody has, which sbatch then refuses."""
    (here / "cluster/refuses").touch()
    cluster.say(answer="allocation failure: Requested node configuration is not available\n", nodes="idle 1\n")
    done = submit("--dry-run", "--", "--partition", "long")
    assert done.exit_code == 0, done.exception
    assert "configuration is not available (there are no such nodes, or they are down)" in done.output
    assert cluster.calls("sinfo") == [["--noheader", "--partition=long", "--format=%c cpus"]]
    cluster.say(answer="allocation failure: Required partition not available (inactive or drain)\n")
    assert "it is closed: sinfo tells" in refused()


def test_words_that_are_no_options_of_sbatch(here):
    assert "'-p=gpu' is not an option of sbatch; write" in refused("--", "-p", "gpu")
    assert "there is no option --partition" in refused("--partition=gpu")
    assert 'there is no launcher "torchrum"; did you mean "torchrun"' in refused("--launcher", "torchrum")


def test_nodes_with_fewer_cpus_than_the_scripts_default(cluster, here):
    cluster.say(nodes="2+ cpus\n6 cpus\n")
    done = submit("--dry-run", "data.workers=2")
    assert "2 nodes x 2 GPUs = 4 ranks by torchrun, 3 CPUs to each" in done.output, done.exception
    assert "#SBATCH --cpus-per-task=6\n" in done.output
    cluster.say(nodes="idle 1\n")
    assert "8 CPUs to each" in submit("--dry-run").output


def test_a_dry_run_where_only_slurms_client_is(cluster, here):
    (here / "cluster/unset").touch()
    done = submit("--dry-run")
    assert done.exit_code == 0, done.exception
    assert "warning: squeue: fatal: Could not establish a configuration source\n" in done.output
    assert "is SLURM_CONF set?" in done.output
    assert cluster.calls("sbatch") == []
    assert "is SLURM_CONF set?" in refused()


def test_shards_are_not_staged_on_the_login_node(cluster, here):
    done = submit("--dry-run", f"data.cache.folder={here / 'cache'}", "data.cache.stage=true")
    assert done.exit_code == 0, done.exception
    assert not (here / "cache").exists()


def test_the_cache_of_a_job_is_a_folder_of_its_node(here, monkeypatch):
    """Its variables are filled in where the job runs; those of everything else are filled in now."""
    monkeypatch.setenv("SCRATCH", "/login")
    words = ["data.cache.folder=$SCRATCH/shards", "run=$SCRATCH/run"]
    config = load_config("c.yaml", words, libraries=False)
    (here / "job.yaml").write_text(submission._written(config, Path("c.yaml"), words))
    monkeypatch.setenv("SCRATCH", "/node")
    of_job = load_config("job.yaml", libraries=False)
    assert (of_job.data.cache.folder, of_job.run) == (Path("/node/shards"), Path("/login/run"))


def test_words_that_anybody_may_read():
    words = ["run=http://u:p@h", "data.train=http://u:p@h", "seed=1"]
    assert [w.partition(":")[0] for w in checks.check_words(words, frozen=False)] == ["run", "data.train"]
    assert [w.partition(":")[0] for w in checks.check_words(words, frozen=True)] == ["run"]


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="needs a folder that nobody may write")
def test_a_run_folder_that_cannot_be_written(here):
    found = checks.Findings()
    checks.check_folder(load_config("c.yaml", ["run=/proc/1/x"]), made(run="/proc/1/x"), found, changed=True)
    assert "/proc/1: cannot be written" in str(found.problems.errors[0])


def test_words_that_no_shell_or_script_may_read(cluster, here, monkeypatch):
    """Names of a configuration and words of a command with quotes, $() and line breaks."""
    bad = here / "bad"
    words = [f"run=runs/\"x\"; touch {bad} $(touch {bad}) 'y'", f"input.std=[1,\n#SBATCH --wrap='touch {bad}'\n1, 1]"]
    words += ["input.mean=[0.5,\n0.5,\n0.5]"]
    monkeypatch.setattr(sys, "argv", ["tlx", "submit", "c.yaml", *words])
    done = submit(*words)
    assert "submitted: job 4711" in done.output, done.exception
    (frozen,) = cluster.calls("sbatch")[1][2:]
    assert str(load_config(frozen).run) == words[0].removeprefix("run=")
    head = (here / "cluster/tried").read_text().partition(MARKER)[0]
    assert len(re.findall("(?m)^#SBATCH", head)) == 11
    assert "--wrap" not in "".join(line for line in head.splitlines() if line.startswith("#SBATCH"))
    said = subprocess.run(
        ["bash", "-u"], input=f'{head}\nprintf %s "$TLX_RUN"', capture_output=True, text=True, check=True
    )
    assert (said.stdout, said.stderr) == (f"{here}/{words[0].removeprefix('run=')}", "")
    assert not bad.exists()


def test_weights_must_be_here_already(cluster, here, monkeypatch):
    """Compute nodes may have no network: the one that this machine has is not used."""
    monkeypatch.setenv("TORCH_HOME", str(here / "torch"))
    monkeypatch.setenv("TLX_WEIGHTS", str(here / "w"))
    asked = []
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: asked.append(a))
    said = refused("backbone={name: torchvision/squeezenet1_1}", "input.size=64")
    assert "these weights are not on this machine" in said
    assert "tlx weights fetch torchvision/squeezenet1_1.IMAGENET1K_V1 --to DIR" in said
    assert not asked


def test_a_fresh_run_leaves_slurms_folder_where_it_is(here):
    """Slurm opens a job's log by its name again after a requeue, and without the folder the job would fail."""
    config = load_config(here / "c.yaml")
    (here / "runs/a/slurm").mkdir(parents=True)
    (here / "runs/a/slurm/1.out").touch()
    folder = RunFolder(config.run)
    claimed(folder, config, fresh=True)
    assert [path.name for path in (here / "runs").iterdir()] == ["a"]  # there was nothing to move aside
    folder.release()
    claimed(folder, config, fresh=True)
    folder.release()
    assert (here / "runs/a/slurm/1.out").exists()
    (aside,) = (here / "runs").glob("a.before-*")
    assert (aside / "config.yaml").exists()

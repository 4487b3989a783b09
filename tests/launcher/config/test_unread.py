"""Options that a run would not read are refused, with a hint what to write instead."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest

from launcher.composition.compose import compose_run
from launcher.config.parts.launching import ClusterConfig, LaunchConfig
from launcher.config.schema import ConfigError
from launcher.launch.sweep import points_of

if TYPE_CHECKING:
    from pathlib import Path


def test_what_is_compared_with_is_what_is_composed_by_default() -> None:
    config = compose_run([])
    assert (config.cluster, config.launch) == (ClusterConfig(), LaunchConfig())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster=example"], "cluster=example is only used with launch=slurm. HINT: launch=slurm"),
        (["cluster.partition=gpu"], "cluster.partition=gpu is only used with launch=slurm. HINT: launch=slurm"),
        (["launch.wait=false"], "launch.wait=false is only used with launch=slurm. HINT: launch=slurm"),
        (["launch.poll_s=3"], "launch.poll_s=3.0 is only used with launch=slurm. HINT: launch=slurm"),
        (["launch.node_rank=1"], "launch.node_rank=1 is only used with launch.rendezvous=. HINT: launch.rendezvous="),
        (
            ["launch=slurm", "launch.rendezvous=a:1"],
            "launch.rendezvous=a:1 is only used with launch=local: SLURM joins the nodes. HINT: launch.rendezvous=null",
        ),
        (["sampling.top_k=5"], "sampling.top_k=5 is not used at sampling.temperature=0. HINT: sampling.temperature=1"),
        (["sampling.top_p=0.5"], "sampling.top_p=0.5 is not used at sampling.temperature=0. HINT: "),
        (
            ["prompts=synthetic", "sampling.max_new_tokens=8"],
            "sampling.max_new_tokens=8 is not used with prompts.output_tokens=32, which fixes the number of new "
            "tokens. HINT: prompts.output_tokens=8",
        ),
        (
            ["prompts=synthetic", "sampling.ignore_eos=false"],
            "sampling.ignore_eos=false is not used with prompts.output_tokens=32, which fixes the number of new "
            "tokens. HINT: prompts.output_tokens=null",
        ),
        (
            ["model.revision=main"],
            "model.revision=main is a revision on the hub, but model.path=embedded:tiny_falcon is on this machine. "
            "HINT: model.revision=null",
        ),
        (
            ["model=falcon_40b", "model.weights=random", "model.revision=main"],
            "model.revision=main is not used with model.weights=random: model=falcon_40b has a config. HINT: ",
        ),
        (
            ["model=falcon_40b", "model.config.num_hidden_layers=2"],
            "model.config.num_hidden_layers is not used with the weights of tiiuae/falcon-40b, which come with a "
            "config.json of their own. HINT: model.weights=random",
        ),
        (
            ["server.python=/bin/python"],
            "server.python is only used with a server, and server=none starts none. HINT: ",
        ),
    ],
)
def test_an_option_that_nothing_reads_is_refused_with_a_hint_that_helps(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    assert str(caught.value).startswith(message)
    compose_run([*overrides, *shlex.split(caught.value.hint)])


@pytest.mark.parametrize(
    ("overrides", "fact", "instead"),
    [
        (["backend=vllm"], "measure.batch_size=4 is not used: backend=vllm makes its", "backend.max_num_seqs=4"),
        (["backend=endpoint", "backend.url=http://a"], "backend=endpoint makes its batches", "load.concurrency=4"),
    ],
)
def test_an_engine_that_batches_itself_reads_no_batch_size(overrides: list[str], fact: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=fact) as caught:
        compose_run([*overrides, "measure.batch_size=4"])
    assert caught.value.hint == instead
    compose_run([*overrides, instead])


def test_a_folder_has_a_config_of_its_own(tmp_path: Path) -> None:
    overrides = ["model=falcon_40b", f"model.path={tmp_path}", "model.config.num_hidden_layers=2", "dry_run=true"]
    with pytest.raises(ConfigError, match=r"model\.config\.num_hidden_layers is not used with model\.path=/"):
        compose_run(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=falcon_40b", "model.weights=random", "model.config.num_hidden_layers=2"],
        ["model=falcon_40b", "dry_run=true", "model.config.num_hidden_layers=2"],
        ["model=falcon_40b", "model.revision=main"],
        ["backend=endpoint", "server=vllm", "server.python=/bin/python"],
        ["launch=slurm", "cluster=example", "launch.wait=false"],
        ["sampling.temperature=0.7", "sampling.top_k=5"],
        ["prompts=synthetic", "sampling.max_new_tokens=64", "prompts.output_tokens=64"],
        ["prompts=synthetic", "prompts.output_tokens=null", "sampling.max_new_tokens=8"],
        ["num_nodes=2", "launch.rendezvous=node1:29400", "launch.node_rank=1"],
    ],
)
def test_what_is_read_is_taken(overrides: list[str]) -> None:
    compose_run(overrides)


def test_a_sweep_over_engines_may_give_all_of_them_what_some_read() -> None:
    points = points_of(["backend=fsdp,vllm", "measure.batch_size=8"])
    assert [point.config.measure.batch_size for point in points] == [8, 8]
    with pytest.raises(ConfigError, match=r"measure\.batch_size=8 is not used: backend=vllm"):
        points_of(["backend=vllm", "devices=1,2", "measure.batch_size=8"])


@pytest.mark.slow
def test_a_sweep_over_guesses_takes_the_keys_of_all_their_kinds() -> None:
    """Each point gets only the keys that it reads, so that its command can be run on its own."""
    shared = ["speculative.tokens=3", "speculative.model=embedded:tiny_draft", "seed=1"]
    points = points_of(["speculative=none,ngram,draft", *shared])
    assert [point.config.speculative.name for point in points] == ["none", "ngram", "draft"]
    assert [point.overrides[1:] for point in points] == [("seed=1",), (shared[0], "seed=1"), tuple(shared)]
    with pytest.raises(ConfigError, match="is not used with speculative=none"):
        points_of(["seed=1,2", "speculative.tokens=3"])

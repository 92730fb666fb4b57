"""Installing: the pipeline runs behind what the user put into Inductor, and its uuid tells all that decides a graph."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from qpass.lowering import pipeline
from qpass.lowering.fingerprint import pipeline_fingerprint
from qpass.lowering.install import FusionObserver, LoweringPass, install, is_installed, uninstall


class UserPass(CustomGraphPass):
    def __init__(self, name="user-1"):
        self.graphs, self.name = [], name

    def __call__(self, graph):
        self.graphs.append(sorted({str(n.target) for n in graph.nodes if "qpass" in str(n.target)}))

    def uuid(self):
        return self.name


def test_install_once_and_uninstall():
    assert not is_installed()
    install()
    first = inductor_config.post_grad_custom_pre_pass
    install()
    assert is_installed()
    assert inductor_config.post_grad_custom_pre_pass is first
    uninstall()
    assert inductor_config.post_grad_custom_pre_pass is None
    assert inductor_config._post_fusion_custom_pass is None


@pytest.mark.parametrize("given", ["object", "function", "list"])
def test_the_users_pass_runs_first(attention, trace, given):
    user = UserPass()
    value = {"object": user, "function": user.__call__, "list": [user]}[given]
    with inductor_config.patch(post_grad_custom_pre_pass=value):
        install()
        chained = inductor_config.post_grad_custom_pre_pass
        traced = trace(attention, torch.randn(2, 32))
        chained(traced.graph, True)
        assert user.graphs == [["qpass.linear.default"]]
        assert traced.count("qpass.linear_q_list") == 1
        # A function has no uuid: Inductor keeps such graphs out of its cache, and so must the chain.
        assert (chained.uuid() is None) == (given == "function")
        uninstall()
        assert inductor_config.post_grad_custom_pre_pass is value


def test_a_pass_set_later_can_be_chained_again():
    install()
    user = UserPass()
    with inductor_config.patch(post_grad_custom_pre_pass=user):
        assert not is_installed()
        install()
        assert is_installed()
        assert inductor_config.post_grad_custom_pre_pass.previous is user


def test_an_inference_aware_pass_is_told():
    slots = torch._inductor.custom_graph_pass
    if not hasattr(slots, "CustomInferenceAwareGraphPass"):
        pytest.skip("this torch has no inference-aware passes")
    told = []

    class Aware(slots.CustomInferenceAwareGraphPass):
        def __call__(self, graph, is_inference):
            told.append(is_inference)

        def uuid(self):
            return "aware"

    LoweringPass(Aware())(torch.fx.Graph(), is_inference=False)
    assert told == [False]


def test_uuid_changes_with_all_that_decides_a_graph(monkeypatch):
    seen = [LoweringPass().uuid()]
    assert LoweringPass().uuid() == seen[0]
    seen.append(LoweringPass(UserPass("user-1")).uuid())
    seen.append(LoweringPass(UserPass("user-2")).uuid())
    with pipeline.disable_pass("merge_parallel_linears"):
        seen.append(LoweringPass().uuid())
    pipeline.register_pass("mine", lambda graph: 0)
    seen.append(LoweringPass().uuid())
    pipeline.unregister_pass("mine")
    pipeline.register_pass("mine", lambda graph: 0, before="verify")
    seen.append(LoweringPass().uuid())
    with pipeline.replace_pass("mine", lambda graph: 1):
        seen.append(LoweringPass().uuid())
    pipeline.unregister_pass("mine")
    monkeypatch.setenv("QPASS_CHECK", "1")
    seen.append(LoweringPass().uuid())
    assert len(set(seen)) == len(seen)
    monkeypatch.delenv("QPASS_CHECK")
    assert LoweringPass().uuid() == seen[0]


def test_uuid_changes_with_the_kernel_table(add_kernel):
    before = pipeline_fingerprint()
    add_kernel("linear_test_native")
    assert pipeline_fingerprint() != before


def test_debugging_bypasses_the_cache(monkeypatch):
    monkeypatch.setenv("QPASS_DEBUG", "3")
    assert LoweringPass().uuid() is None


def test_the_observer_chains_and_is_part_of_a_pickled_key():
    observer = FusionObserver(None)
    assert observer([]) == []
    assert pickle.loads(pickle.dumps(observer)).uuid() == observer.uuid()
    bare = list
    with inductor_config.patch(_post_fusion_custom_pass=bare):
        install()
        assert inductor_config._post_fusion_custom_pass is bare  # a bare function keeps its graphs out of the cache

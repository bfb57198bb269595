"""NaLaFormer: sizes, timm's contract, published weights."""

import pytest
import timm
import torch
from test_backbone_ravlt import check_published
from timm_contract import CHECKS, backward, default_cfg, forward, parameters

COUNTS = {
    "nalaformer_xtiny": 6_142_248,
    "nalaformer_tiny": 15_907_752,
    "nalaformer_small": 25_654_184,
    "nalaformer_base": 52_002_952,
    "nalaformer_large": 95_426_760,
}
QUICK = [forward, backward, default_cfg]  # blocks and skeleton are those of RAVLT, which runs the others


def test_every_name_is_counted():
    assert set(timm.list_models(module="nala")) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert parameters(name) == COUNTS[name]


@pytest.mark.parametrize("check", QUICK, ids=lambda check: check.__name__)
def test_contract(check):
    check("nalaformer_xtiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_the_rest(check, name):
    if name != "nalaformer_xtiny" or check not in QUICK:
        check(name)


@torch.no_grad()
def test_published_weights():
    check_published("nala", out_gate="normed", twice=True)

"""The cells of an ablation: what is varied, what is held equal, and which dense models come with them."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe.ablation.cells import Hold, plan_cells, shortened
from moe.accounting.counts import count_parameters
from moe.accounting.memory import estimate_memory
from moe.config import Config, ConfigError, changed, load_config
from moe.model.transformer import Transformer
from tests.support.paths import CONFIGS
from tests.support.paths import TINY as TINY_FILE

TINY = load_config(TINY_FILE, ["model.vocab_size=1024"])


def by_name(cells):
    return {cell.name: cell for cell in cells}


def test_active_flops_are_held_by_the_width_of_the_experts_within_1_percent():
    cells = by_name(plan_cells(TINY, {"moe.num_experts": [1, 2, 4, 8, 16, 32]}, "active_flops"))
    reference = count_parameters(TINY).flops_per_token_forward
    for name, cell in cells.items():
        if name not in ("dense,double_active", "dense,equal_total"):
            assert abs(cell.counts.flops_per_token_forward / reference - 1) < 0.01
            assert cell.mismatch == pytest.approx(cell.counts.flops_per_token_forward / reference - 1)
    # By hand: a router of E experts costs as much as E / 3 of expert width; 2 x 256 + 8 / 3 in the reference.
    widths = {name: cell.config.moe.d_ff_expert for name, cell in cells.items()}
    assert [widths[f"num_experts={e}"] for e in (1, 2, 4, 8, 16, 32)] == [512, 256, 256, 256, 256, 256]


def test_one_expert_of_the_ablation_is_the_dense_twin():
    (cell,) = (
        c for c in plan_cells(TINY, {"moe.num_experts": [1, 8]}, "active_flops") if c.name == "num_experts=1"
    )
    twin = load_config(CONFIGS / "tiny_dense.yaml", ["model.vocab_size=1024"])
    ours, theirs = cell.config.model_dump(exclude={"run"}), twin.model_dump(exclude={"run"})
    assert ours == theirs
    assert cell.is_dense


def test_the_flops_that_torch_counts_in_the_planned_models_are_equal_within_1_percent():
    measured = {}
    for cell in plan_cells(TINY, {"moe.num_experts": [1, 2, 4, 8, 16, 32]}, "active_flops"):
        model = Transformer(cell.config, expert_path="reference").eval()
        tokens = torch.randint(0, 1024, (2, 128))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(tokens)
        # torch counts the weighted sum over a token's experts as a product; by our convention sums are free.
        weighted = 0 if cell.is_dense else 4 * 2 * cell.config.moe.top_k * 128
        measured[cell.name] = counter.get_total_flops() / tokens.numel() - weighted
    double, total = measured.pop("dense,double_active"), measured.pop("dense,equal_total")
    assert max(measured.values()) / min(measured.values()) < 1.02  # each within 1 % of the reference:
    assert all(abs(flops / measured["num_experts=8"] - 1) < 0.01 for flops in measured.values())
    assert total > double > 1.9 * measured["num_experts=8"]


def test_cells_of_one_seed_share_all_initial_weights_outside_experts_and_routers():
    initial = []
    for cell in plan_cells(TINY, {"moe.num_experts": [1, 4, 8]}, "active_flops"):
        model = Transformer(changed(cell.config, {"run.seed": 5}))
        initial.append(dict(model.named_parameters()))
    shared = {name for name in initial[0] if ".ffn." not in name}
    assert len(shared) == 4 * (2 + 4) + 3  # per layer two norms and four projections; embedding, norm, head
    for other in initial[1:]:
        assert shared == {name for name in other if ".ffn." not in name}
        assert all(torch.equal(initial[0][name], other[name]) for name in shared)


def test_granularity_keeps_total_and_active_parameters_but_for_the_router():
    cells = by_name(plan_cells(TINY, {"granularity": [1, 2, 4]}, "active_flops"))
    shapes = {
        g: (c.num_experts, c.top_k, c.d_ff_expert)
        for g in (1, 2, 4)
        for c in [cells[f"granularity={g}"].config.moe]
    }
    assert shapes == {1: (8, 2, 256), 2: (16, 4, 128), 4: (32, 8, 64)}
    unheld = by_name(plan_cells(TINY, {"granularity": [4]}, "none"))["granularity=4"].config.moe
    assert (unheld.num_experts, unheld.top_k, unheld.d_ff_expert) == shapes[4]
    router = 4 * 128 * 8  # layers, width, experts of the reference
    for g in (1, 2, 4):
        counts = cells[f"granularity={g}"].counts
        assert counts.total - count_parameters(TINY).total == (g - 1) * router
        assert counts.active_all - count_parameters(TINY).active_all == (g - 1) * router


def test_granularity_splits_shared_experts_too():
    shared = load_config(TINY_FILE, ["model.vocab_size=1024", "moe.num_shared_experts=1"])
    for hold in ("active_flops", "none"):
        cell = by_name(plan_cells(shared, {"granularity": [2]}, hold))["granularity=2"]
        moe = cell.config.moe
        assert (moe.num_experts, moe.top_k, moe.num_shared_experts, moe.d_ff_expert) == (16, 4, 2, 128)
        router = 4 * 128 * 8  # layers, width, experts of the reference
        assert cell.counts.total - count_parameters(shared).total == router
        assert cell.counts.active_all - count_parameters(shared).active_all == router


def test_more_experts_per_token_are_narrower_and_the_gate_rule_stays():
    cells = by_name(plan_cells(TINY, {"moe.top_k": [2, 4, 8]}, "active_flops"))
    assert [cells[f"top_k={k}"].config.moe.d_ff_expert for k in (2, 4, 8)] == [256, 128, 64]
    assert {cells[f"top_k={k}"].config.moe.normalize_gate_weights for k in (2, 4, 8)} == {True}
    with pytest.raises(
        ConfigError, match=r"moe\.normalize_gate_weights"
    ):  # not switched behind the user's back
        plan_cells(TINY, {"moe.top_k": [1, 2]}, "active_flops")


def test_widths_are_multiples_of_8_and_a_miss_of_more_than_1_percent_either_way_is_refused():
    # By hand: 2 x 256 / 3 = 170.7, so 3 x 168 = 504, 1.6 % off in the experts, which take 63 % of the FLOPs.
    (cell,) = (c for c in plan_cells(TINY, {"moe.top_k": [3]}, "active_flops") if c.name == "top_k=3")
    assert cell.config.moe.d_ff_expert == 168
    assert cell.mismatch == pytest.approx(
        4 * 6 * 128 * (504 - 512) / count_parameters(TINY).flops_per_token_forward
    )
    # 2 x 64 / 3 = 42.7, so 3 x 40 = 120 or 3 x 48 = 144, where experts take 30 %: 1.9 % below, 3.7 % above.
    narrow = load_config(TINY_FILE, ["model.vocab_size=1024", "moe.d_ff_expert=64"])
    with pytest.raises(ConfigError, match=r"top_k=3 misses active_flops by -1\.9% with experts 40 wide"):
        plan_cells(narrow, {"moe.top_k": [3]}, "active_flops")


def test_total_parameters_and_memory_can_be_held_instead():
    measured: list[tuple[Hold, Callable[[Config], int]]] = [
        ("total_params", lambda config: count_parameters(config).total),
        ("memory", lambda config: estimate_memory(config, 1, "cpu").peak),
    ]
    for hold, measure in measured:
        for cell in plan_cells(TINY, {"moe.num_experts": [4, 8, 16]}, hold):
            if not cell.is_dense:
                assert measure(cell.config) == pytest.approx(measure(TINY), rel=0.01)


def test_nothing_held_leaves_the_width_alone():
    cells = by_name(plan_cells(TINY, {"moe.d_ff_expert": [64, 128]}, "none"))
    assert [cells[f"d_ff_expert={w}"].config.moe.d_ff_expert for w in (64, 128)] == [64, 128]


def test_the_dense_baselines_are_always_there_and_the_costly_one_only_where_affordable():
    cells = by_name(plan_cells(TINY, {"moe.num_experts": [8]}, "active_flops"))
    dense = {"dense,equal_active": 512, "dense,double_active": 1328, "dense,equal_total": 2048}
    assert set(cells) == {"num_experts=8", *dense}
    for name, width in dense.items():
        assert cells[name].config.moe.d_ff_expert == width
    # By hand: an expert's FLOPs are 6 D per unit of width, in 4 layers; the router's, 2 D E.
    flops = {name: cell.counts.flops_per_token_forward for name, cell in cells.items()}
    assert flops["num_experts=8"] - flops["dense,equal_active"] == 4 * 2 * 128 * 8
    assert flops["dense,double_active"] - flops["dense,equal_active"] == 4 * 6 * 128 * (1328 - 512)
    assert flops["dense,double_active"] == pytest.approx(2 * flops["num_experts=8"], rel=0.01)
    assert cells["dense,equal_total"].counts.total == pytest.approx(count_parameters(TINY).total, rel=0.01)
    many = load_config(TINY_FILE, ["model.vocab_size=1024", "moe.num_experts=64"])
    assert "dense,equal_total" not in by_name(plan_cells(many, {"moe.z_loss_coef": [0.0]}, "active_flops"))
    beyond = load_config(TINY_FILE, ["model.vocab_size=1024", "moe.num_experts=2048"])
    assert "dense,equal_total" not in by_name(plan_cells(beyond, {"moe.num_experts": [8]}, "active_flops"))


def test_the_dense_baselines_can_be_left_out():
    cells = plan_cells(TINY, {"moe.num_experts": [1, 8]}, "active_flops", baselines=False)
    assert [cell.name for cell in cells] == ["num_experts=1", "num_experts=8"]


def test_granularity_divides_the_experts_of_the_other_settings():
    cells = by_name(plan_cells(TINY, {"granularity": [1, 2], "moe.num_experts": [8, 16]}, "active_flops"))
    shapes = {
        name: (c.config.moe.num_experts, c.config.moe.top_k, c.config.moe.d_ff_expert)
        for name, c in cells.items()
        if not c.is_dense
    }
    assert shapes == {
        "granularity=1,num_experts=8": (8, 2, 256),
        "granularity=1,num_experts=16": (16, 2, 256),
        "granularity=2,num_experts=8": (16, 4, 128),
        "granularity=2,num_experts=16": (32, 4, 128),
    }


def test_one_expert_has_no_routing_to_vary():
    cells = plan_cells(TINY, {"moe.num_experts": [1, 8], "moe.capacity_factor": [None, 1.5]}, "active_flops")
    assert [cell.name for cell in cells if cell.is_dense and not cell.name.startswith("dense")] == [
        "num_experts=1,capacity_factor=null"
    ]


def test_a_reference_with_split_experts_has_dense_baselines_too():
    split = load_config(
        TINY_FILE, ["model.vocab_size=1024", "parallel.ep_size=4", "train.micro_batch_size=2"]
    )
    cells = by_name(plan_cells(split, {"moe.num_experts": [8, 16]}, "active_flops"))
    assert cells["num_experts=16"].config.parallel.ep_size == 4
    assert cells["dense,equal_active"].config.parallel.ep_size == 1
    assert by_name(plan_cells(split, {"moe.num_experts": [8]}, "memory"))["num_experts=8"].mismatch == 0


def test_two_settings_make_every_combination():
    cells = plan_cells(TINY, {"moe.num_experts": [4, 8], "moe.z_loss_coef": [0.0, 0.1]}, "active_flops")
    assert sum(not cell.is_dense for cell in cells) == 4


@pytest.mark.parametrize(
    ("vary", "hold", "complaint"),
    [
        ({"moe.d_ff_expert": [64]}, "active_flops", "--hold: active_flops is held by the width"),
        ({"moe.colour": [1]}, "active_flops", "--vary: 'moe.colour' is not granularity or a key of moe"),
        ({"optim.lr": [1e-3]}, "none", "--vary: 'optim.lr' is not granularity or a key of moe"),
        ({"granularity": [0]}, "active_flops", "granularity: should be a whole number above 0, got 0"),
        ({"granularity": [True]}, "active_flops", "granularity: should be a whole number above 0, got true"),
        ({"granularity": [3]}, "active_flops", "granularity: 3 does not divide"),
        ({"moe.top_k": [99]}, "active_flops", "moe.top_k: 99 is more than"),
        ({"granularity": [8]}, "active_flops", "--hold: granularity=8 misses active_flops by"),
    ],
)
def test_what_cannot_be_planned_is_refused(vary, hold, complaint):
    with pytest.raises(ConfigError) as caught:
        plan_cells(TINY, vary, hold)
    assert str(caught.value).startswith(complaint)


def test_a_shortened_configuration_has_so_many_times_fewer_steps_and_is_evaluated_twice():
    settings = {"train.steps": 160, "optim.warmup_steps": 20, "train.eval_interval": 40}
    train = (quick := shortened(changed(TINY, settings), 10)).train
    assert (train.steps, train.eval_interval, train.checkpoint_interval) == (16, 8, 8)
    assert quick.optim.warmup_steps == 2
    odd = shortened(changed(TINY, {"train.steps": 34, "optim.warmup_steps": 0}), 10).train
    assert (odd.steps, odd.eval_interval) == (3, 2)

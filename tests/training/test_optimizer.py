"""The optimizer: against torch's own, for dense gradients, for sparse ones, and for both together."""

import copy

import pytest
import torch

from silo.errors import UsageError
from silo.modeling import SiloConfig, SiloForCausalLM
from training import optimizer as rows_of
from training.optimizer import ROWS_AT_ONCE, RowAdamW, clip_gradients, make_optimizer

ROWS = ROWS_AT_ONCE + 40
"""More than are copied in one go."""


@pytest.fixture(params=["compiled", "copied"])
def way(request, monkeypatch):
    """Both ways to update rows: in place by a compiled loop in several threads, and by torch, as on a GPU."""
    if request.param == "copied":
        monkeypatch.setattr(rows_of, "COMPILED", ())
    monkeypatch.setattr(rows_of, "ALONE", 64)
    return request.param


def matrices(count: int = 2) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    first = torch.randn(ROWS, 8)
    return [torch.nn.Parameter(first.clone()) for _ in range(count)]


def sparse(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A gradient as autograd leaves it: not marked as coalesced."""
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, (ROWS, 8), check_invariants=True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("every_row_sparse", [False, True])
def test_it_is_adamw_when_every_row_has_a_gradient(every_row_sparse):
    """With dense gradients, and with sparse ones that name every row, weights are those of torch's AdamW."""
    ours, theirs = matrices()
    mine = RowAdamW([ours], lr=0.1, weight_decay=0.2)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
    for step in range(5):
        gradient = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(step))
        ours.grad = sparse(torch.arange(ROWS), gradient) if every_row_sparse else gradient.clone()
        theirs.grad = gradient
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("way")
def test_it_is_sparse_adam_without_decay():
    """For rows that come and go, weights are those of torch's SparseAdam: moments stand still, steps count on."""
    ours, theirs = matrices()
    mine = RowAdamW([ours], lr=0.1, weight_decay=0.0)
    reference = torch.optim.SparseAdam([theirs], lr=0.1, betas=(0.9, 0.95))
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randperm(ROWS, generator=generator)[: ROWS - 100 * (step % 3)]
        gradient = sparse(rows, torch.randn(len(rows), 8, generator=generator))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # eps stands elsewhere in their formula


@pytest.mark.usefixtures("way")
def test_rows_without_a_gradient_do_not_move():
    """A row that nobody chose keeps every bit, in weights and moments, weight decay or not; a chosen one decays."""
    (weight,) = matrices(1)
    before = weight.detach().clone()
    optimizer = RowAdamW([weight], lr=0.1, weight_decay=0.5)
    weight.grad = sparse(torch.tensor([3, 7]), torch.zeros(2, 8))
    optimizer.step()
    still = torch.ones(ROWS, dtype=torch.bool)
    still[[3, 7]] = False
    assert torch.equal(weight[still], before[still])
    torch.testing.assert_close(weight[[3, 7]], before[[3, 7]] * (1 - 0.1 * 0.5))
    assert optimizer.state[weight]["exp_avg"][still].abs().max() == 0


def updated(dtype: torch.dtype = torch.float32, threads: int = 1) -> tuple[torch.Tensor, RowAdamW]:
    """A matrix after four steps on rows that come and go, by so many threads."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(ROWS, 8, dtype=dtype))
    optimizer, usual = RowAdamW([weight], lr=0.1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            rows = torch.randperm(ROWS, generator=generator)[: ROWS - 100 * (step % 3)]
            weight.grad = sparse(rows, torch.randn(len(rows), 8, generator=generator).to(dtype))
            optimizer.step()
    finally:
        torch.set_num_threads(usual)
    return weight, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_to_update_rows_give_the_same(monkeypatch, dtype):
    """The compiled loop gives weights and moments of the same type as torch's kernel, up to rounding."""
    weight, optimizer = updated(dtype)
    monkeypatch.setattr(rows_of, "COMPILED", ())
    other, reference = updated(dtype)
    assert weight.dtype == dtype
    close = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(weight, other, rtol=close, atol=close)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        ours, theirs = optimizer.state[weight][name], reference.state[other][name]
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    """Rows are dealt out to threads, more than there are cores, and none is left out or done twice."""
    monkeypatch.setattr(rows_of, "ALONE", 64)
    alone, _ = updated(threads=1)
    for threads in (2, 5):
        assert torch.equal(updated(threads=threads)[0], alone)


def test_rows_of_other_types_are_updated_by_torch():
    """Half-precision weights move, and keep their type."""
    before = torch.nn.Parameter(torch.ones(ROWS, 8, dtype=torch.bfloat16))
    before.grad = sparse(torch.tensor([3]), torch.ones(1, 8, dtype=torch.bfloat16))
    RowAdamW([before], lr=0.1).step()
    assert before.dtype == torch.bfloat16
    assert (before[3] < 1).all()
    assert (before[4] == 1).all()


def test_a_gradient_of_no_rows_moves_nothing():
    """As when no token reached a layer: nothing fails, and the step counts."""
    (weight,) = matrices(1)
    before = weight.detach().clone()
    weight.grad = sparse(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8))
    optimizer = RowAdamW([weight], lr=0.1)
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["step"] == 1


def test_a_step_forms_nothing_of_the_size_of_all_experts():
    """Forward, backward, clipping and step of a PEER model allocate less than one matrix of experts, all together."""
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiloForCausalLM(
        SiloConfig(
            **shape, num_key_value_heads=1, ffn="peer", peer_num_experts=512**2, peer_heads=2,
            peer_experts_per_head=4, key_dim=8,
        )
    ).train()  # fmt: skip
    optimizer = RowAdamW(model.parameters())
    tokens = torch.randint(50, (1, 16))

    def step():
        model(tokens, labels=tokens).loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # which makes the moments
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    matrix = model.model.layers[0].mlp.up.weight.nbytes
    assert largest < matrix / 50
    assert profile.events().total_average().self_cpu_memory_usage < matrix


def test_state_goes_on_where_it_was_saved():
    """Loading state into another optimizer, after any number of steps, gives the same next step in every bit."""
    first, second = matrices()
    one, two = RowAdamW([first]), RowAdamW([second])
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        rows = torch.randperm(ROWS, generator=generator)[:20]
        first.grad = sparse(rows, torch.randn(20, 8, generator=generator))
        if step == 2:
            with torch.no_grad():
                second.copy_(first)
            two.load_state_dict(copy.deepcopy(one.state_dict()))
            second.grad = first.grad.clone()
            two.step()
        one.step()
    assert torch.equal(first, second)


@pytest.mark.parametrize("rate", [None, 3e-3])
def test_retrieved_experts_may_have_a_rate_of_their_own(rate):
    """PEER's experts and a memory's values, and nothing else, learn at their own rate; every weight is in one group."""
    shape = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1, "key_dim": 4}
    shape |= {"num_key_value_heads": 1, "intermediate_size": 8, "peer_num_experts": 64, "peer_experts_per_head": 4}
    shape |= {"pkm_num_values": 64, "pkm_values_per_head": 4}
    model = SiloForCausalLM(SiloConfig(**shape, ffn=["peer", "dense", "pkm"]))
    groups = make_optimizer(model, 1e-3, 0.1, rate).param_groups
    rates = {id(each): group["initial_lr"] for group in groups for each in group["params"]}
    experts = {"model.layers.0.mlp.down.weight", "model.layers.0.mlp.up.weight", "model.layers.2.mlp.values.weight"}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(model.parameters()))
    for name, each in model.named_parameters():
        assert rates[id(each)] == (rate if rate and name in experts else 1e-3), name


def test_clipping_counts_dense_and_sparse_together():
    """The norm is that of all gradients, repeated rows added up; above the bound all are scaled, below none."""
    for accumulated in (False, True):
        dense, large = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(ROWS, 8))
        dense.grad = torch.tensor([3.0, 0.0, 0.0])
        rows = torch.tensor([5, 9, 5] if accumulated else [5, 9])
        values = torch.zeros(len(rows), 8)
        values[0, 0] = 1.0 if accumulated else 4.0
        values[-1, 0] = 3.0 if accumulated else 0.0
        large.grad = sparse(rows, values)
        norm = clip_gradients([dense, large], 10.0)
        assert norm.item() == pytest.approx(5.0)
        assert dense.grad[0] == 3.0
        clip_gradients([dense, large], 2.5)
        assert dense.grad[0].item() == pytest.approx(1.5, rel=1e-5)
        assert large.grad.to_dense()[5, 0].item() == pytest.approx(2.0, rel=1e-5)
    assert clip_gradients([torch.nn.Parameter(torch.zeros(3))], 1.0) == 0
    with pytest.raises(UsageError, match="max_norm is -1"):
        clip_gradients([], -1)


def test_clipping_is_torchs_for_dense_gradients():
    """For dense gradients norm and scaled gradients are those of torch's own clipping, bit for bit."""
    ours, theirs = matrices()
    ours.grad = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1))
    theirs.grad = ours.grad.clone()
    assert torch.equal(clip_gradients([ours], 1.0), torch.nn.utils.clip_grad_norm_([theirs], 1.0))
    assert torch.equal(ours.grad, theirs.grad)

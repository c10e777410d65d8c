"""Retrieval by product keys, and the layers on it: against plain loops over all keys and all experts."""

import math

import pytest
import torch

from silo.modeling import SiloConfig, SiloForCausalLM
from silo.product_keys import PeerFFN, PkmFFN, best_pairs
from silo.rows import Choice, coalesced, dot_rows, dots, stably_sorted, sum_rows

SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "ffn": "peer", "key_dim": 6}
PEER = {"peer_num_experts": 49, "peer_heads": 3, "peer_experts_per_head": 4}
PKM = {"pkm_num_values": 49, "pkm_heads": 3, "pkm_values_per_head": 4}
VARIANTS = [
    {},
    {"shared_keys": False},
    {"query_batch_norm": False},
    {"query_batch_norm": False, "shared_keys": False, "sparse_gradients": False},
]


def random_layer(kind, **settings):
    """A float64 layer whose weights are all of order 1."""
    torch.manual_seed(0)
    layer = kind(SiloConfig(**SHAPE, **PEER, **PKM, **settings)).double().eval()
    with torch.no_grad():
        for parameter in (*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())):
            parameter.normal_(std=0.5)
            if "var" in str(parameter):
                parameter.abs_()
    if settings.get("query_batch_norm", True):
        layer.retrieval.norm.running_var.uniform_(0.5, 2.0)
    return layer


@torch.no_grad()
def by_loop(layer, row: torch.Tensor, k: int = 4) -> torch.Tensor:
    """What a layer gives for one token, with every product key scored and sorted, head by head."""
    retrieval = layer.retrieval
    query = retrieval.norm((retrieval.query.weight @ row).unsqueeze(0))[0].view(3, 2, -1)
    out = torch.zeros_like(row)
    for head in range(3):
        first, second = retrieval.keys[0 if len(retrieval.keys) == 1 else head]
        scores = {
            (i, j): float(first[i] @ query[head, 0] + second[j] @ query[head, 1]) for i in range(7) for j in range(7)
        }
        found = sorted(scores, key=lambda pair: -scores[pair])[:k]
        total = sum(math.exp(scores[pair]) for pair in found)
        for i, j in found:
            weight, number = math.exp(scores[i, j]) / total, 7 * i + j
            if isinstance(layer, PkmFFN):
                out = out + weight * layer.values.weight[number]
            else:
                inner = float(layer.down.weight[number] @ row)
                gelu = inner * 0.5 * (1 + math.erf(inner / math.sqrt(2)))
                out = out + weight * gelu * layer.up.weight[number]
    return out


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", [PeerFFN, PkmFFN])
def test_a_layer_is_a_loop_over_all_experts(kind, settings):
    """PEER and PKM give what scoring every key, sorting, and adding up the chosen ones gives."""
    layer = random_layer(kind, **settings)
    x = torch.randn(2, 200, 16, dtype=torch.float64)
    ours = layer(x)[0]
    for token in (0, 1, 57, 199):
        torch.testing.assert_close(ours[1, token], by_loop(layer, x[1, token]))


def test_a_layer_in_single_precision_is_the_same():
    """float32 takes the same experts and gives the same output, up to its precision."""
    layer = random_layer(PeerFFN)
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    expected, found = layer(x)
    ours, routing = layer.float()(x.float())
    assert torch.equal(routing.expert, found.expert)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", [PeerFFN, PkmFFN])
def test_gradients_are_those_of_a_dense_reference(kind, settings):
    """Sparse gradients, made dense, are those that autograd gives when every expert is computed for every token."""
    layer = random_layer(kind, **settings).train(settings.get("query_batch_norm", True))
    x = torch.randn(1, 11, 16, dtype=torch.float64, requires_grad=True)
    toward = torch.randn(1, 11, 16, dtype=torch.float64)
    out, routing = layer(x)
    retrieval = layer.retrieval
    query = retrieval.norm(retrieval.query(x[0])).view(11, 3, 2, -1)
    first, second = (
        torch.einsum("thc,hnc->thn", query[:, :, half], retrieval.keys[:, half].expand(3, -1, -1)) for half in (0, 1)
    )
    scores = (first.unsqueeze(3) + second.unsqueeze(2)).flatten(2)
    chosen = routing.expert.view(11, 3, 4)
    weight = torch.zeros_like(scores).scatter(2, chosen, scores.gather(2, chosen).softmax(2))
    if kind is PkmFFN:
        expected = torch.einsum("thn,nd->td", weight, layer.values.weight)
    else:
        inner = torch.nn.functional.gelu(x[0] @ layer.down.weight.T)
        expected = torch.einsum("thn,tn,nd->td", weight, inner, layer.up.weight)
    torch.testing.assert_close(out[0], expected)
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad((out * toward).sum(), leaves)
    theirs = torch.autograd.grad((expected * toward[0]).sum(), leaves)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.to_dense(), their)
    large = layer.up.weight if kind is PeerFFN else layer.values.weight
    assert ours[[leaf is large for leaf in leaves].index(True)].is_sparse is settings.get("sparse_gradients", True)


def test_retrieval_passes_gradcheck():
    """Scores have the gradients of finite differences in queries and keys, with heads that share keys or do not."""
    for settings in ({}, {"shared_keys": False}):
        layer = random_layer(PeerFFN, query_batch_norm=False, **settings)
        x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
        names = [name for name, _ in layer.retrieval.named_parameters()]

        def run(x, *weights, layer=layer, names=names):
            return torch.func.functional_call(layer.retrieval, dict(zip(names, weights, strict=True)), (x,))[0]

        assert torch.autograd.gradcheck(run, (x, *layer.retrieval.parameters()))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [9, 20])
def test_products_with_rows(kind, rows):
    """dot_rows and sum_rows are the products with the gathered rows, in every precision, repeated rows included."""
    torch.manual_seed(0)
    x, matrix, index = torch.randn(70, 16).to(kind), torch.randn(rows, 16).to(kind), torch.randint(9, (70, 12))
    weight = torch.randn(70, 12).to(kind)
    gathered = matrix[index].double()
    tolerance = {"rtol": 3e-2, "atol": 0.1} if kind == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    expected = torch.einsum("td,tkd->tk", x.double(), gathered)
    torch.testing.assert_close(dots(x, matrix, index).double(), expected, **tolerance)
    torch.testing.assert_close(dot_rows(x, matrix, Choice(index)).double(), expected, **tolerance)
    expected = torch.einsum("tk,tkd->td", weight.double(), gathered)
    torch.testing.assert_close(sum_rows(weight, matrix, Choice(index)).double(), expected, **tolerance)


def test_gradients_hold_the_rows_taken_once_each():
    """A gradient's rows ascend, and there are as many as different experts: nothing of the whole size."""
    layer = random_layer(PeerFFN).train()
    out, routing = layer(torch.randn(1, 3, 16, dtype=torch.float64))
    out.sum().backward()
    for parameter in (layer.down.weight, layer.up.weight):
        assert parameter.grad.is_sparse
        assert torch.equal(parameter.grad._indices()[0], routing.expert.unique())


@pytest.mark.parametrize(("count", "below"), [(0, 1), (1, 1), (2, 1), (1000, 7), (1024, 2**20), (1025, 2**40)])
def test_numbers_are_sorted_as_torch_sorts_them_stably(count, below):
    """Values and places, of many equal ones and of large ones; places of equal ones ascend."""
    numbers = torch.randint(below, (count,), generator=torch.Generator().manual_seed(count))
    for ours, theirs in zip(stably_sorted(numbers), numbers.sort(stable=True), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_that_add_up_are_coalesced_anew():
    """Of several backward passes the sum remains, by rows; of one what it gave, without a copy."""
    layer = random_layer(PeerFFN).train()
    once = []
    for seed in range(2):
        torch.manual_seed(seed)
        layer.up.weight.grad = None
        layer(torch.randn(1, 3, 16, dtype=torch.float64))[0].sum().backward()
        once.append(layer.up.weight.grad)
    assert coalesced(once[0]).values().data_ptr() == once[0]._values().data_ptr()
    for order in (once, once[::-1]):
        both = coalesced(order[0] + order[1])
        assert both.is_coalesced()
        assert (both.indices()[0].diff() > 0).all()
        torch.testing.assert_close(both.to_dense(), once[0].to_dense() + once[1].to_dense())


def test_the_best_pairs_are_the_best_of_all_pairs():
    """Of 20 x 20 sums the 16 found are the 16 greatest."""
    halves = torch.randn(3, 2, 40, 20, generator=torch.Generator().manual_seed(0))
    score, first, second = best_pairs(halves, 16, 1)
    sums = (halves[:, 0].unsqueeze(3) + halves[:, 1].unsqueeze(2)).flatten(2)
    expected = sums.topk(16)
    assert torch.equal(score, expected.values)
    assert torch.equal(first * 20 + second, expected.indices)


def test_siblings_compete():
    """Of each pair of siblings only the better can be found."""
    halves = torch.tensor([[[[5.0, 9.0, 1.0, 0.0, 7.0, 8.0]], [[3.0, 1.0, 0.0, 0.5, 2.0, 2.5]]]])
    score, first, second = best_pairs(halves, 2, 2)
    assert score.tolist() == [[[12.0, 11.5]]]
    assert first.tolist() == [[[1, 1]]]
    assert second.tolist() == [[[0, 5]]]


def test_query_norm_leaks_nothing_in_evaluation_and_two_numbers_in_training():
    """In evaluation another token changes nothing; in training it does only through mean and spread of the batch."""
    layer = random_layer(PeerFFN)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    changed = x.clone()
    changed[0, 7] += 1
    before, after = layer(x)[0], layer(changed)[0]
    assert torch.equal(before[0, :7], after[0, :7])
    norm = layer.retrieval.norm
    queries = layer.retrieval.query(x[0])
    scaled = (queries - queries.mean(0)) / (queries.var(0, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(norm.train()(queries), scaled * norm.weight + norm.bias)


def test_mixed_precision_reaches_no_expert():
    """Under autocast experts stay in their own precision, the loss stays close, and gradients come out sparse."""
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": 50, "num_hidden_layers": 2, "intermediate_size": 8}
    model = SiloForCausalLM(SiloConfig(**shape, **PEER, initializer_range=0.1)).eval()
    tokens = torch.randint(50, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens, labels=tokens)
    half.loss.backward()
    torch.testing.assert_close(half.loss, model(tokens, labels=tokens).loss, rtol=2e-2, atol=2e-2)
    assert model.model.layers[0].mlp.down.weight.grad.is_sparse

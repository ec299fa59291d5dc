import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_step import NMPattern, apply_nm_masks, find_targets, strip
from lightning_step.parametrization import nm_masks

# torch's own, of a plain layer too.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
TWO_FOUR = NMPattern(2, 4)


class CountingLSTM(nn.LSTM):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.calls = 0

    def forward(self, x, hx=None):
        self.calls += 1
        return super().forward(x, hx)


LAYERS = {
    "LSTM": lambda: nn.LSTM(8, 12),
    "GRU": lambda: nn.GRU(8, 12),
    "RNN": lambda: nn.RNN(8, 12, nonlinearity="relu"),
    "subclass": lambda: CountingLSTM(8, 12),
    "deep": lambda: nn.LSTM(8, 12, num_layers=3, bidirectional=True, batch_first=True, bias=False),
    "projected": lambda: nn.LSTM(8, 12, num_layers=2, bidirectional=True, proj_size=4),
    "double": lambda: nn.GRU(8, 12, dtype=torch.float64),
}
CELLS = {"LSTMCell": nn.LSTMCell, "GRUCell": nn.GRUCell, "RNNCell": nn.RNNCell}


def by_hand(weight, pattern=TWO_FOUR):
    """Sorts every group as a Python list."""
    rows = [[-abs(w) for w in group] for group in weight.detach().reshape(-1, pattern.m).tolist()]
    mask = [[i in sorted(range(pattern.m), key=row.__getitem__)[: pattern.n] for i in range(pattern.m)] for row in rows]
    return torch.tensor(mask).reshape(weight.shape)


@torch.no_grad()
def pruned(layer):
    """A plain layer with the zeros in its weights."""
    twin = copy.deepcopy(layer)
    for name, parameter in twin.named_parameters():
        if name.startswith("weight_"):
            parameter.mul_(by_hand(parameter))
    return twin


def flat(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for part in output for tensor in flat(part)]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture(params=LAYERS)
def case(request):
    """A plain layer, an equal masked one, a plain one pruned by hand, and an input."""
    torch.manual_seed(1)
    plain = LAYERS[request.param]()
    masked = copy.deepcopy(plain)
    apply_nm_masks(masked, TWO_FOUR)
    return plain, masked, pruned(plain), torch.randn(5, 3, 8, dtype=plain.weight_ih_l0.dtype)


@pytest.mark.parametrize("make", [*LAYERS.values(), *(lambda cell=cell: cell(8, 12) for cell in CELLS.values())])
def test_all_weights_are_masked_along_the_input_and_no_bias_is(make):
    layer = make()
    targets = find_targets(layer, TWO_FOUR)
    weights = [name for name, _ in layer.named_parameters() if name.startswith("weight_")]
    assert {t.name: t.dim for t in targets.masked} == dict.fromkeys(weights, 1)
    assert {t.kind for t in targets.masked} == {type(layer).__name__}
    assert {entry.reason for entry in targets.left_out} <= {"1-D (a bias or a scale)"}


def test_groups_lie_along_what_one_gate_sums_over():
    layer = nn.LSTM(8, 12, proj_size=4)
    for target in find_targets(layer, TWO_FOUR).masked:
        weight, inputs = getattr(layer, target.name), layer.get_parameter(target.name).shape[1]
        row = (weight @ torch.ones(inputs))[1]
        (grad,) = torch.autograd.grad(row, weight)
        groups = (grad != 0).movedim(target.dim, -1).reshape(-1, 4)
        assert torch.equal(groups.any(1), groups.all(1))
        assert int(groups.sum()) == inputs


def test_a_size_that_m_does_not_divide_stays_dense_and_the_rest_is_masked():
    targets = find_targets(nn.LSTM(6, 8), TWO_FOUR)
    assert [t.name for t in targets.masked] == ["weight_hh_l0"]
    assert targets.left_out[0].reason == "size 6 along dim 1 is not divisible by m=4"


@pytest.mark.parametrize("gradient", ["straight_through", "masked"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_equal_a_plain_layer_pruned_by_hand(case, training, gradient):
    plain, masked, by, x = case
    for mask in nm_masks(masked).values():
        mask.gradient = gradient
    outputs = []
    for layer in (masked, by):
        output = flat(layer.train(training)(x))
        sum(tensor.square().sum() for tensor in output).backward()
        outputs.append(output)
    assert_same(*outputs)
    assert not torch.equal(outputs[0][0], flat(plain(x))[0])
    for name, parameter in masked.named_parameters():
        expected = by.get_parameter(name).grad
        if gradient == "masked" and name.startswith("weight_"):
            expected = expected * by_hand(plain.get_parameter(name))
        assert_same(parameter.grad, expected)
        assert_same(parameter, plain.get_parameter(name))


@pytest.mark.parametrize("kind", CELLS)
def test_cells_equal_a_plain_cell_pruned_by_hand(kind):
    plain = CELLS[kind](8, 12)
    masked, x = copy.deepcopy(plain), torch.randn(3, 8)
    apply_nm_masks(masked, TWO_FOUR)
    assert_same(flat(masked(x)), flat(pruned(plain)(x)))
    assert strip(masked) == ["weight_ih", "weight_hh"]
    assert_same(flat(masked(x)), flat(pruned(plain)(x)))


def test_off_and_on_again(case):
    plain, masked, by, x = case
    for enabled, expected in ((True, by), (False, plain), (True, by)):
        for mask in nm_masks(masked).values():
            mask.enabled = enabled
        assert_same(flat(masked(x)), flat(expected(x)))


def test_one_masked_weight_of_several():
    layer = nn.LSTM(8, 12)
    twin = copy.deepcopy(layer)
    apply_nm_masks(layer, TWO_FOUR, include=["weight_hh_l0"])
    with torch.no_grad():
        twin.weight_hh_l0.mul_(by_hand(twin.weight_hh_l0))
    x = torch.randn(5, 3, 8)
    assert_same(flat(layer(x)), flat(twin(x)))


def test_packed_sequences_and_a_first_hidden_state():
    layer = nn.GRU(8, 12)
    twin, x, h = pruned(layer), torch.randn(5, 3, 8), torch.randn(1, 3, 12)
    apply_nm_masks(layer, TWO_FOUR)
    packed = pack_padded_sequence(x, torch.tensor([5, 4, 2]))
    assert_same(layer(packed, h)[0].data, twin(packed, h)[0].data)


def test_the_layer_keeps_its_parameters_and_no_masked_weight_stays_behind(case):
    plain, masked, _, x = case
    before = [(name, id(p), p.data_ptr()) for name, p in masked.named_parameters()]
    for _ in range(2):
        flat(masked(x))[0].sum().backward()
    assert [(name, id(p), p.data_ptr()) for name, p in masked.named_parameters()] == before
    assert vars(masked).keys() - vars(plain).keys() == {"_nm_masks"}
    assert [id(p) for p in masked._flat_weights] == [id(p) for p in masked.parameters()]
    assert list(masked.state_dict()) == list(plain.state_dict())


def test_a_subclass_keeps_what_its_forward_stores():
    layer = CountingLSTM(8, 12)
    apply_nm_masks(layer, TWO_FOUR)
    layer(torch.randn(5, 3, 8))
    layer(torch.randn(5, 3, 8))
    assert layer.calls == 2


def by_torch_save(layer):
    torch.save(layer, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), by_torch_save])
def test_copies_compute_the_same_with_weights_of_their_own(case, copied, after_forward):
    _, masked, by, x = case
    if after_forward:
        masked(x)
    twin = copied(masked)
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in masked.parameters())
    assert [id(p) for p in twin._flat_weights] == [id(p) for p in twin.parameters()]
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.zero_()
    assert_same(flat(twin(x)), flat(by(x)))


@pytest.mark.parametrize("change", ["load", "to", "assign", "in place"])
def test_a_changed_weight_is_seen(case, change):
    _, masked, _, x = case
    masked(x)
    source = copy.deepcopy(masked)
    strip(source)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn_like(parameter))
    if change == "load":
        masked.load_state_dict(source.state_dict())
    elif change == "to":
        masked.load_state_dict(source.state_dict())
        masked, source, x = masked.to(torch.bfloat16), source.to(torch.bfloat16), x.to(torch.bfloat16)
    elif change == "assign":
        for name, parameter in source.named_parameters():
            setattr(masked, name, nn.Parameter(parameter.detach().clone()))
    else:
        for name, parameter in masked.named_parameters():
            parameter.data = source.get_parameter(name).data.clone()
    assert_same(flat(masked(x)), flat(pruned(source)(x)))
    assert [id(p) for p in masked._flat_weights] == [id(p) for p in masked.parameters()]


def test_functional_call_masks_the_weights_it_is_given(case):
    plain, masked, _, x = case
    given = {name: (p.detach() * -2).roll(1, -1) for name, p in plain.named_parameters()}
    source = copy.deepcopy(plain)
    source.load_state_dict(given)
    assert_same(flat(torch.func.functional_call(masked, given, (x,))), flat(pruned(source)(x)))
    assert_same(flat(masked(x)), flat(pruned(plain)(x)))


def test_strip_gives_back_the_plain_layer_with_zeros(case):
    plain, masked, by, x = case
    masked(x)
    assert strip(masked) == [name for name, _ in plain.named_parameters() if name.startswith("weight_")]
    assert (type(masked), vars(masked).keys()) == (type(plain), vars(plain).keys())
    assert_same(dict(masked.state_dict()), dict(by.state_dict()))
    assert_same(flat(masked(x)), flat(by(x)))
    assert [id(p) for p in masked._flat_weights] == [id(p) for p in masked.parameters()]


def test_an_error_in_forward_leaves_the_layer_whole(case):
    _, masked, by, x = case
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        masked(x[..., :7])
    assert [id(p) for p in masked._flat_weights] == [id(p) for p in masked.parameters()]
    assert_same(flat(masked(x)), flat(by(x)))


def test_threads_see_masked_weights_and_the_parameters_at_once(case):
    """One thread is in the middle of a forward pass while another looks at the layer and runs one of its own."""
    _, masked, by, x = case
    inside, go_on, seen = threading.Event(), threading.Event(), {}

    def check_input(*args):
        inside.set()
        assert go_on.wait(60)

    with torch.no_grad():
        expected = flat(by(x))
        masked.check_input = check_input
        thread = threading.Thread(target=lambda: seen.update(output=flat(torch.no_grad()(masked)(x))))
        thread.start()
        assert inside.wait(60)
        del masked.check_input
        assert [id(p) for p in masked._flat_weights] == [id(p) for p in masked.parameters()]
        assert_same(flat(masked(x)), expected)
        go_on.set()
        thread.join()
    assert_same(seen["output"], expected)


def test_a_forward_pass_does_not_make_the_list_of_the_parameters_anew(case):
    """It would have to switch the masks off for that, under the eyes of other threads, and cuDNN would move the weights."""
    _, masked, by, x = case
    calls = []
    masked._init_flat_weights = lambda: calls.append("init")
    assert_same(flat(masked(x)), flat(by(x)))
    copy.copy(masked)
    assert calls == []

"""The PyTorch side by itself: its mask, its losses and its loop, against numbers made by hand."""

import math
import re

import numpy as np
import oracles
import pytest

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch", reason="PyTorch comes with the parity extra")
pytest.importorskip("transformers", reason="transformers comes with the parity extra")

from tw_jax.parity import torch_oracle  # noqa: E402  (after the skip)

FIELDS = {
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """A random Llama."""
    folder = tmp_path_factory.mktemp("llama")
    torch_oracle.write_random(folder, FIELDS, seed=0)
    return torch_oracle.Oracle(folder, "float32")


@pytest.fixture
def calls():
    """Three calls: (context, sampled)."""
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 23, context), rng.integers(0, 23, sampled))
        for context, sampled in ((4, 3), (6, 5), (2, 1))
    ]


def as_rows(calls, weight):
    """The calls as plain rows, padded; `weight` for each call's sampled tokens."""
    size = max(len(c) + len(s) for c, s in calls)
    shape = (len(calls), size)
    tokens, weights = np.zeros(shape, int), np.zeros(shape)
    parent = np.broadcast_to(np.arange(size), shape).copy()
    depth = np.zeros(shape, int)
    for row, (context, sampled) in enumerate(calls):
        length = len(context) + len(sampled)
        tokens[row, :length] = np.concatenate([context, sampled])
        parent[row, :length] = np.maximum(np.arange(length) - 1, 0)
        depth[row, :length] = np.arange(length)
        weights[row, len(context) : length] = weight[row]
    return torch_oracle.Rows(tokens, parent, depth, weights, (weights > 0).astype(float))


def test_a_node_sees_itself_and_its_ancestors():
    parent = np.array([0, 0, 1, 0, 3, 2, 6])
    want = oracles.visible_by_parents(np.where(parent == np.arange(7), -1, parent))
    np.testing.assert_array_equal(torch_oracle.visible(parent), want)


def test_random_weights_leave_no_scale_at_one(oracle):
    for name, weight in oracle.weights().items():
        assert weight.std() > 0.05, name


def test_a_branch_of_a_trie_reads_as_its_path_alone(oracle, close):
    rng = np.random.default_rng(1)
    stem, left, right = (rng.integers(0, 23, n) for n in (4, 3, 5))
    tokens = np.concatenate([stem, left, right])[None]
    parent = np.maximum(np.arange(12) - 1, 0)
    parent[7] = 3
    depth = np.concatenate([np.arange(7), np.arange(4, 9)])[None]
    nothing = np.zeros((1, 12))
    rows = torch_oracle.Rows(tokens, parent[None], depth, nothing, nothing)
    packed = dict(oracle.walk(rows))["logits"][0, 7:]
    alone = as_rows([(stem, right)], [1])
    close("model", packed, dict(oracle.walk(alone))["logits"][0, 4:])


def test_the_stages_come_in_order_and_the_last_hidden_state_is_normed_once(oracle, calls, close):
    made = dict(oracle.walk(as_rows(calls, [1, 1, 1])))
    assert list(made) == ["embed", "block.0", "block.1", "norm", "logits"]
    weights = oracle.weights()
    np.testing.assert_array_equal(
        made["embed"][0, 0], weights["model.embed_tokens.weight"][calls[0][0][0]]
    )
    x = made["block.1"]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights["model.norm.weight"]
    close("module", made["norm"], normed)


def test_on_chains_the_call_loss_is_the_stock_loss(oracle, calls, close):
    rows = as_rows(calls, [1, 1, 1])
    close("rounding", oracle.call_loss(rows), oracle.flat_loss(rows))


def test_a_call_loss_weighs_by_tokens_not_by_rows(oracle, calls, close):
    rows = as_rows(calls, [1, 2, 3])
    logp = oracle.logp(rows)
    want = -(rows.weight * logp).sum() / rows.weight.sum()
    close("rounding", oracle.call_loss(rows), want)


def test_policy_loss_by_hand():
    # One row a case: ratio 1; rises beyond 1.28 with a good and a bad advantage; falls below 0.8.
    ratios, advantages = [1.0, 2.0, 4.0, 0.5, 0.5], [1.0, 1.0, -1.0, 1.0, -1.0]
    said = [torch.tensor([math.log(r)], dtype=torch.float64) for r in ratios]
    old = [torch.zeros(1, dtype=torch.float64)] * 5
    want = [-1.0, -1.28, 3.0, -0.5, 0.8]
    for one, advantage, value in zip(said, advantages, want, strict=True):
        found = torch_oracle.policy_loss([one], old[:1], [advantage]).item()
        assert found == pytest.approx(value)
    together = torch_oracle.policy_loss(said, old, advantages).item()
    assert together == pytest.approx(sum(want) / 5)


def test_policy_loss_is_a_mean_over_tokens_not_over_rows():
    said = [torch.zeros(3), torch.zeros(1)]
    assert torch_oracle.policy_loss(said, said, [1.0, 5.0]).item() == pytest.approx(-8 / 4)


def test_on_policy_pgrpo_is_reinforce(oracle, calls, close):
    # At ratio 1 the gradient is that of -sum A logp / tokens: the call loss with weights A.
    advantages = [1.0, 0.5, 2.0]
    rows = as_rows(calls, advantages)
    logp = oracle.logp(rows)
    old = [logp[n, len(c) : len(c) + len(s)] for n, (c, s) in enumerate(calls)]
    loss, gradients = oracle.pgrpo(calls, advantages, old)
    tokens = sum(len(s) for _, s in calls)
    close("equality_loss", loss, -rows.weight.sum() / tokens)
    recipe = torch_oracle.Recipe(0.0, "cosine", 0, 1, (0.9, 0.95), 1e-8, 0.0, None)
    plain = oracle.train([rows], recipe).gradients
    for name, gradient in gradients.items():
        want = plain[name] * rows.weight.sum() / tokens
        close("module", gradient, want, what=name)


def test_off_policy_pgrpo_has_the_slope_of_its_own_differences(oracle, calls, close):
    # Ratios away from 1 and from the edges of the clip, where the loss has a kink.
    advantages, rng = [1.0, -0.5, 2.0], np.random.default_rng(3)
    logp = oracle.logp(as_rows(calls, [1, 1, 1]))
    old = [
        logp[n, len(c) : len(c) + len(s)] - rng.choice([-0.5, -0.1, 0.1, 0.5], len(s))
        for n, (c, s) in enumerate(calls)
    ]
    _, gradients = oracle.pgrpo(calls, advantages, old)
    name = "model.layers.1.self_attn.v_proj.weight"
    parameter = dict(oracle.model.named_parameters())[name]
    way = gradients[name] / np.linalg.norm(gradients[name])
    before, found = parameter.detach().clone(), []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.copy_(before + sign * 1e-2 * torch.from_numpy(way))
        found.append(oracle.pgrpo(calls, advantages, old)[0])
    with torch.no_grad():
        parameter.copy_(before)
    slope = (found[0] - found[1]) / 2e-2
    close("finite_difference", slope, np.linalg.norm(gradients[name]))


def test_training_lowers_the_loss_and_puts_the_weights_back(oracle, calls):
    rows = as_rows(calls, [1, 1, 1])
    before = {n: w.copy() for n, w in oracle.weights().items()}
    recipe = torch_oracle.Recipe(1e-2, "cosine", 2, 12, (0.9, 0.95), 1e-8, 0.1, 1.0)
    made = oracle.train([rows], recipe)
    assert made.losses[0] == made.losses[1]  # the first update of a warm-up has rate 0
    assert made.losses[-1] < made.losses[0] - 0.5
    for name, weight in oracle.weights().items():
        np.testing.assert_array_equal(weight, before[name])
        assert not np.array_equal(made.params[name], weight)


def test_decay_spares_norms(oracle, calls):
    rows = as_rows(calls, [1, 1, 1])
    kept, decayed = (
        oracle.train(
            [rows], torch_oracle.Recipe(1e-3, "cosine", 0, 1, (0.9, 0.95), 1e-8, decay, 1.0)
        ).params
        for decay in (0.0, 0.5)
    )
    same = {name for name in kept if np.array_equal(kept[name], decayed[name])}
    assert same == {name for name in kept if "norm" in name}


def test_greedy_takes_the_likeliest_of_a_full_pass_and_keeps_its_stop(oracle):
    context, made = [3, 1, 4], []
    for _ in range(8):
        logits = dict(oracle.walk(as_rows([(np.array(context + made), np.array([0]))], [1])))
        made.append(int(logits["logits"][0, len(context) + len(made) - 1].argmax()))
    assert oracle.greedy(context, stops=[], limit=8) == made
    stop = made[4]
    assert oracle.greedy(context, stops=[stop], limit=8) == made[: made.index(stop) + 1]


class Scripted:
    """Answers the calls of a loop with given texts, and keeps what it was asked."""

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def greedy(self, context, *, stops, limit):
        self.asked.append(decode(context))
        ids = encode(self.texts.pop(0))
        ends = [n for n, i in enumerate(ids) if i in stops]
        return ids[: ends[0] + 1 if ends else limit][:limit]


TAGS = [f"<{s}{t}>" for t in ("Parallel", "Outlines", "Outline", "Thread") for s in ("", "/")]
PIECES = [chr(i) for i in range(128)] + [*TAGS, "<eos>"]


def encode(text):
    """A character or a tag is an id."""
    found = re.findall(r"</?(?:Parallel|Outlines|Outline|Thread)>|<eos>|.", text, re.DOTALL)
    return [PIECES.index(piece) for piece in found]


def decode(ids):
    """The text of ids."""
    return "".join(PIECES[i] for i in ids)


def threads(**changes):
    """Limits that nothing reaches."""
    limits = {"max_new": 500, "max_thread": 50, "max_threads": 8, "max_rounds": 16} | changes
    return torch_oracle.Threads(encode, decode, encode("<eos>"), **limits)


FORK = "a<Parallel><Outlines><Outline>1: x</Outline><Outline> 2 : y</Outline></Outlines>"


def test_threads_see_the_prefix_and_their_header_and_are_joined_in_order():
    model = Scripted(FORK, " b\n</Thread>", " c\n</Thread>", "</Parallel>d<eos>")
    made = decode(torch_oracle.fork_join(model, encode("q"), threads()))
    joined = f"{FORK}\n<Thread>\n1: b\n</Thread><Thread>\n2: c\n</Thread>\n"
    assert made == f"{joined}</Parallel>d<eos>"
    heads = [f"q{FORK}\n<Thread>\n1:", f"q{FORK}\n<Thread>\n2:"]
    assert model.asked == ["q", *heads, f"q{joined}"]


def test_a_thread_that_ends_without_its_tag_is_closed():
    model = Scripted(FORK, " b<eos>", " c" * 99, "<eos>")
    made = decode(torch_oracle.fork_join(model, encode("q"), threads(max_thread=4)))
    assert made == f"{FORK}\n<Thread>\n1: b\n</Thread><Thread>\n2: c c\n</Thread>\n<eos>"


def test_outlines_of_another_block_do_not_fork_again():
    model = Scripted("a</Outlines>", "b<eos>")
    assert decode(torch_oracle.fork_join(model, encode("q"), threads())) == "a</Outlines>b<eos>"

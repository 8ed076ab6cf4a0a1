"""SPO as a method: its plan by hand against a float64 transcription of the recipe, its advantage, loss and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import losses, methods
from grpo_jax.training.host_state import decode, encode
from grpo_jax.types import Contexts, Decisions, Prompt, Rollout, State

IDS = [3, 4, 7, 9, 12]  # of a dataset in which other rows were left out


class Pool:
    def __init__(self, ids=IDS):
        self.prompts = {i: Prompt(i, f"prompt {i}") for i in ids}

    def __iter__(self):
        return iter(self.prompts.values())

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, i):
        return self.prompts[i]


class World:
    """A policy that says `logp(prompt, tokens, version)`, and a reward that is written for each prompt and version."""

    def __init__(self, method, ids=IDS):
        self.method, self.pool, self.version, self.asked = method, Pool(ids), 0, []
        self.state = method.init(self.pool)

    def logp(self, prompt, token, place):
        return -0.1 * (1 + token % 3) - 0.003 * self.version * (prompt % 4) * (place + 1)

    def reward(self, prompt, index):
        return float((prompt + index + self.version) % 3 == 0)

    def sample(self, requests):
        self.asked.append(requests)
        flat = [(r, g) for g, r in enumerate(requests) for _ in range(r.count)]
        numbers = {}
        lengths, tokens, logps, index = [], np.zeros((len(flat), 4), np.int32), np.full((len(flat), 4), np.nan), []
        for row, (r, _) in enumerate(flat):
            index.append(numbers.setdefault(r.prompt.id, 0))
            numbers[r.prompt.id] += 1
            given = r.prefix[0] if r.prefix else (np.arange(2 + r.prompt.id % 3) + self.version + index[-1]) % 5
            assert r.prefix is None or (r.max_new == 0 and np.isnan(r.prefix[1]).all())
            lengths.append(len(given))
            tokens[row, : len(given)] = given
            logps[row, : len(given)] = [self.logp(r.prompt.id, t, k) for k, t in enumerate(given)]
        n, mask = len(flat), np.arange(4) < np.array(lengths)[:, None]
        return Rollout(
            contexts=Contexts(tokens=np.array([[r.prompt.id, 5] for r in requests]), lengths=np.full(len(requests), 2)),
            sampled_under=np.array([g for _, g in flat]),
            trained_under=np.array([g for _, g in flat]),
            completions=tokens,
            lengths=np.array(lengths, np.int32),
            completion_mask=mask,
            behavior_logps=logps.astype(np.float32),
            sampler_logps=logps.astype(np.float32),
            finished=np.ones(n, bool),
            temperature=np.full(n, 0.9, np.float32),
            prompt_ids=np.array([r.prompt.id for r, _ in flat], np.int32),
            index=np.array(index, np.int32),
            group_ids=np.array([g for _, g in flat], np.int32),
            weights=np.ones(n, np.float32),
            update_ids=np.full(n, -1, np.int32),
            scores=np.zeros((n, 0), np.float32),
        )

    def score(self, rows):
        scores = [self.reward(int(p), int(i)) for p, i in zip(rows.prompt_ids, rows.index)]
        return rows.replace(scores=np.array(scores, np.float32)[:, None], channels=("exact",), channel_weights=(1.0,))

    def step(self):
        key = jax.random.key(self.state.step)
        plan = self.method.plan(self.state, lambda state, n: self.method.select(state, self.pool, n, key), None)
        self.asked, answer = [], None
        try:
            while True:
                ask = plan.send(answer)
                answer = self.score(ask) if isinstance(ask, Rollout) else self.sample(ask)
        except StopIteration as end:
            host, (rows,) = end.value
        host = decode(*encode(host))  # as a checkpoint would give it back
        self.state, self.version = State(self.state.step + 1, {}, host), self.version + 1
        return rows


def resolve(prompts=3, group_size=1, **options):
    return methods.resolve("spo", options=options, settings={"prompts": prompts, "group_size": group_size})


class Recipe:
    """The published order of things: evaluate, update, look back with the policy after the update, store with it."""

    def __init__(self, world, successes, n0, rho_min=0.875):
        mass = 1 / (1 - rho_min) if n0 else 1.0
        self.alpha = {i: mass * (s + 0.5) / (n0 + 1) for i, s in successes.items()}
        self.beta = {i: mass * (n0 - s + 0.5) / (n0 + 1) for i, s in successes.items()}
        self.world, self.stored = world, {}

    def rate(self, i):
        return self.alpha[i] / (self.alpha[i] + self.beta[i])

    def after_update(self, rows, constant):
        """world.version is that of the policy after the step."""
        for i, score in zip(rows.prompt_ids.tolist(), rows.scores[:, 0]):
            drift = 0.0
            if i in self.stored:
                old, before = self.stored[i]
                drift = np.mean([abs(b - self.world.logp(i, t, k)) for k, (t, b) in enumerate(zip(old, before))])
            rho = 0.875 if constant else np.clip(2 ** (-drift / 0.06), 0.875, 0.96)
            self.alpha[i], self.beta[i] = rho * self.alpha[i] + score, rho * self.beta[i] + 1 - score
        for i, tokens, length in zip(rows.prompt_ids.tolist(), rows.completions, rows.lengths):
            own = tokens[:length].tolist()
            self.stored[i] = own, [self.world.logp(i, t, k) for k, t in enumerate(own)]


@pytest.mark.parametrize(("rho", "offline"), [("adaptive", 4), ("constant", 4), ("adaptive", 0)])
def test_plan_is_the_recipe(rho, offline):
    world = World(resolve(rho=rho, offline=offline))
    successes = {i: sum(world.reward(i, k) for k in range(offline)) for i in IDS}
    recipe, drifts = Recipe(world, successes, offline), set()
    for step in range(7):
        rows = world.step()
        assert len(rows) == 3 and len(set(rows.prompt_ids.tolist())) == 3  # without replacement
        np.testing.assert_allclose(rows.columns["baseline"], [recipe.rate(i) for i in rows.prompt_ids], rtol=1e-5)
        asked = [[(r.prompt.id, r.count, r.max_new) for r in round] for round in world.asked]
        assert [sum(c for _, c, _ in round) for round in asked[-1:]] == [3]
        if step == 0 and offline:
            assert sorted(sum(asked[:-1], [])) == [(i, offline, None) for i in IDS]
        elif step and rho == "adaptive":
            back = [r for r in world.asked[0][3:]]  # the visit before, of those that had one
            drifts |= {r.prompt.id for r in back}
            assert [r.max_new for r in world.asked[0]] == [0] * (3 + len(back)) and len(asked) == 2
            first = world.asked[0][0]
            assert first.context.tolist() == [first.prompt.id, 5] and first.temperature == pytest.approx(0.9)
        else:
            assert len(asked) == 1
        recipe.after_update(rows, rho == "constant")
    assert len(drifts) >= 3 or rho == "constant"


def test_adaptive_memory_differs_from_the_constant_one():
    one, other = World(resolve(rho="adaptive")), World(resolve(rho="constant"))
    for world in (one, other):
        for _ in range(6):
            world.step()
    mass = [w.state.host["alpha"] + w.state.host["beta"] for w in (one, other)]
    np.testing.assert_allclose(mass[1], 8, rtol=1e-5)  # 1 / (1 - 0.875), kept
    assert (mass[0] > 8.01).any() and (mass[0] < 25.01).all()


@pytest.mark.parametrize(
    "option",
    [{"gamma": 20.0}, {"explore": 9.0}, {"half_life": 0.005}, {"rho_min": 0.5}, {"rho_max": 0.9}, {"offline": 2}],
)
def test_no_option_of_the_plan_is_ignored(option):
    seen = []
    for options in ({}, option):
        world = World(resolve(**options))
        rows = [world.step() for _ in range(6)]
        seen.append([(r.prompt_ids.tolist(), r.columns["baseline"].round(5).tolist()) for r in rows])
    assert seen[0] != seen[1]


def test_more_prompts_than_the_pool_has():
    """Drawn with replacement; the visits of a prompt are taken in one after the other."""
    world = World(resolve(prompts=4, group_size=2, rho="constant"), IDS[:3])
    rows = world.step()
    assert len(rows) == 8 and set(rows.prompt_ids.tolist()) <= set(IDS[:3])
    host = world.state.host
    world.step()
    alpha = dict(zip(host["ids"].tolist(), host["alpha"].tolist()))
    for i, score in zip(rows.prompt_ids.tolist(), rows.scores[:, 0]):
        alpha[i] = 0.875 * alpha[i] + score
    np.testing.assert_allclose(world.state.host["alpha"], list(alpha.values()), rtol=1e-5)


def test_uncertain_prompts_are_drawn_more_often():
    method, pool = resolve(explore=0.01), Pool()
    state = method.init(pool)
    host = {**state.host, "alpha": np.float32([99, 1, 50, 1, 99]), "beta": np.float32([1, 99, 50, 99, 1])}
    drawn = [method.select(State(0, {}, host), pool, 1, jax.random.key(k))[0].id for k in range(120)]
    weights = np.sqrt(host["alpha"] * host["beta"]) / 100 + 0.01
    assert np.mean(np.array(drawn) == 7) == pytest.approx(weights[2] / weights.sum(), abs=0.12)
    assert set(drawn) > {7}


def test_rewards_that_are_no_rates():
    world = World(resolve())
    world.reward = lambda prompt, index: 2.0
    with pytest.raises(ValueError, match=r"rewards must lie in \[0, 1\], got 2.0 to 2.0"):
        world.step()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rho": "none"}, r"spo's rho is one of \('adaptive', 'constant'\), got 'none'"),
        ({"whiten_weight": "row"}, r"spo's whiten_weight is one of \('sequence', 'token'\), got 'row'"),
        ({"kl": 0.1}, "'spo' has no option 'kl'"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        resolve(**options)


def test_worked_example(make):
    batch = make.batch([1, 0, 1], groups=[0, 1, 2]).replace(columns={"baseline": jnp.array([1 / 6, 1 / 2, 5 / 6])})
    batch, _ = resolve().advantage(batch, {}, None)
    np.testing.assert_allclose(batch.advantages, [[1, 1], [-1, -1], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("whiten_weight", ["sequence", "token"])
@pytest.mark.parametrize("seed", [0, 1])
def test_against_float64(make, seed, whiten_weight):
    data = make.ragged(seed, binary=True)
    draw = np.random.default_rng(seed)
    baseline = draw.uniform(0.1, 0.9, len(data.total))
    data.new = data.old + draw.normal(0, 1.5, data.old.shape)  # beyond every clip, the dual one too
    method = resolve(whiten_weight=whiten_weight, clip_low=0.1, clip_high=0.3, dual=3.0)
    batch = data.batch().replace(columns={"baseline": jnp.float32(baseline)})
    batch, _ = jax.jit(lambda batch: method.advantage(batch, {}, None))(batch)
    rows = [i for i in range(len(baseline)) if data.groups[i] >= 0 and not np.isnan(data.total[i])]
    often = {i: data.mask[i].sum() if whiten_weight == "token" else 1 for i in rows}
    every = [data.total[i] - baseline[i] for i in rows for _ in range(often[i])]
    values = np.zeros(len(baseline))
    for i in rows:
        values[i] = (data.total[i] - baseline[i] - np.mean(every)) / np.std(every, ddof=1)
    np.testing.assert_allclose(batch.advantages, np.where(data.mask, values[:, None], 0), rtol=1e-4, atol=1e-5)

    def loss_of(new):
        total = size = 0.0
        for i, t in np.argwhere(data.mask & (data.weights > 0)[:, None]):
            a, ratio = values[i], np.exp(new[i, t] - data.old[i, t])
            each = max(-a * ratio, -a * np.clip(ratio, 0.9, 1.3))
            total += data.weights[i] * (min(each, -3 * a) if a < 0 else each)
            size += data.weights[i]
        return total / size

    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        each, _ = method.objective(Decisions(logps=logps), batch, {})
        return losses.weighted_sum(each, method.aggregate(batch))

    got, gradient = loss(jnp.asarray(data.new, jnp.float32))
    assert float(got) == pytest.approx(loss_of(data.new), rel=2e-5)
    for place in np.ndindex(data.new.shape):
        up, down = data.new.copy(), data.new.copy()
        up[place], down[place] = up[place] + 1e-6, down[place] - 1e-6
        np.testing.assert_allclose(gradient[place], (loss_of(up) - loss_of(down)) / 2e-6, atol=3e-5)
    assert (np.exp(data.new - data.old)[(values < 0)[:, None] & data.mask] > 3).any()

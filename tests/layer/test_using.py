"""`using`: what one thread or asyncio task computes with, whatever others do."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import convlora
from convlora import ConvLoRAError
from convlora.layer.adapted import slot_of

CHOICES: list[Any] = ["rain", "snow", {"rain": 0.5, "snow": 2.0}, []]


def net(factors: str = "locon") -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 4))
    for name in ("rain", "snow"):
        convlora.inject(model, "*", rank=2, factors=factors, name=name, bias=True)
    return oracle.randomise(model)


def x() -> Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


def outputs(model: nn.Module) -> list[Tensor]:
    """By `activate`, for each choice."""
    with torch.no_grad():
        return [convlora.activate(model, names)(x()) for names in CHOICES]


@pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
@pytest.mark.parametrize("factors", oracle.FACTORS)
def test_a_block_computes_what_activate_would(factors: str) -> None:
    model = net(factors)
    expected = outputs(model)
    convlora.activate(model, "snow")
    for names, y in zip(CHOICES, expected, strict=True):
        with torch.no_grad(), convlora.using(model, names):
            assert torch.equal(model(x()), y)
        assert torch.equal(model(x()), expected[1])


def test_a_training_step_in_a_block_trains_what_it_names() -> None:
    model = net()
    convlora.activate(model, "rain")
    model(x()).square().sum().backward()
    expected = [p.grad.clone() for p in convlora.parameters(model, "rain") if p.grad is not None]
    model.zero_grad()
    convlora.activate(model, [])
    with convlora.using(model, "rain"):
        model(x()).square().sum().backward()
    gradients = [p.grad for p in convlora.parameters(model, "rain")]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True) if b is not None)
    assert all(p.grad is None for p in convlora.parameters(model, "snow"))


def test_blocks_nest_and_end_with_an_exception() -> None:
    model = net()
    expected = outputs(model)
    convlora.activate(model, "snow")
    with torch.no_grad(), convlora.using(model, "rain"):
        with pytest.raises(ZeroDivisionError), convlora.using(model, []):
            assert torch.equal(model(x()), expected[3])
            1 / 0  # noqa: B018
        assert torch.equal(model(x()), expected[0])
    assert torch.equal(model(x()), expected[1])
    assert all(slot_of(model[i]).choices == 0 for i in (0, 2, 4))


def test_blocks_of_two_models_do_not_touch_each_other() -> None:
    one, other = net(), net("convlora")
    expected = outputs(one)[0], outputs(other)[1]
    with torch.no_grad(), convlora.using(one, "rain"), convlora.using(other, "snow"):
        assert torch.equal(one(x()), expected[0])
        assert torch.equal(other(x()), expected[1])


def test_what_others_switch_is_not_seen_inside() -> None:
    model = net()
    expected = outputs(model)
    actions: list[Callable[[], Any]] = [
        lambda: convlora.activate(model, []),
        lambda: convlora.merge(model, "snow"),
        lambda: convlora.unmerge(model),
    ]
    with torch.no_grad(), convlora.using(model, "rain"):
        for action in actions:
            thread = threading.Thread(target=action)
            thread.start()
            thread.join()
            assert torch.equal(model(x()), expected[0])


def test_a_block_is_not_seen_by_other_threads() -> None:
    model = net()
    expected = outputs(model)
    convlora.activate(model, "snow")
    seen = []
    with torch.no_grad(), convlora.using(model, "rain"):
        thread = threading.Thread(target=lambda: seen.append(model(x()).detach()))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], expected[1])


def test_threads_compute_each_with_their_own() -> None:
    model = net()
    expected = outputs(model)
    wrong: list[int] = []

    def serve(which: int) -> None:
        with torch.no_grad():
            for turn in range(50):
                choice = (which + turn) % len(CHOICES)
                with convlora.using(model, CHOICES[choice]):
                    if not torch.equal(model(x()), expected[choice]):
                        wrong.append(choice)

    threads = [threading.Thread(target=serve, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_asyncio_tasks_compute_each_with_their_own() -> None:
    model = net()
    expected = outputs(model)

    async def serve(choice: int) -> bool:
        with convlora.using(model, CHOICES[choice]):
            await asyncio.sleep(0)
            here = model(x()).detach()
            await asyncio.sleep(0)
            there = await asyncio.to_thread(lambda: model(x()).detach())
            return torch.equal(here, expected[choice]) and torch.equal(there, expected[choice])

    async def serve_all() -> list[bool]:
        return await asyncio.gather(*(serve(turn % len(CHOICES)) for turn in range(24)))

    assert all(asyncio.run(serve_all()))


def test_a_merged_model_computes_live_inside() -> None:
    model = net()
    expected = outputs(model)
    convlora.merge(model, "snow")
    with torch.no_grad(), convlora.using(model, "rain"):
        assert torch.equal(model(x()), expected[0])
    assert torch.equal(model(x()), expected[1])


def test_a_copy_made_inside_is_not_in_the_block() -> None:
    model = net()
    expected = outputs(model)
    convlora.activate(model, "snow")
    with torch.no_grad(), convlora.using(model, "rain"):
        twin, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(x()), expected[1])
        assert torch.equal(unpickled(x()), expected[1])


def test_kept_weights_of_many_choices_take_bounded_memory() -> None:
    model = net()
    with torch.no_grad():
        for step in range(200):
            with convlora.using(model, {"rain": step / 7}):
                model(x())
    assert all(len(slot_of(model[i])._fused) <= 32 for i in (0, 2, 4))


def test_an_unknown_name_changes_nothing() -> None:
    model = net()
    with pytest.raises(ConvLoRAError, match="using: no adapter 'hail'"), convlora.using(model, "hail"):
        pass
    assert slot_of(model[0]).choices == 0


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_a_compiled_model_is_refused_in_one_line(how: str) -> None:
    model: Any = net()
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        (model if how == "in place" else model[0]).compile(backend="eager")
    with pytest.raises(ConvLoRAError, match="a compiled model computes with what activate says") as caught:  # noqa: SIM117
        with convlora.using(model, "rain"):
            pass
    assert "\n" not in str(caught.value)


def test_a_graph_around_a_model_is_refused_and_runs_on_outside() -> None:
    model = net()
    expected = convlora.activate(model, "snow")(x())
    compiled = torch.compile(lambda x: model(x) + 1, backend="eager")
    torch.testing.assert_close(compiled(x()), expected + 1)
    with convlora.using(model, "rain"), pytest.raises(Exception, match="using: a compiled model"):
        compiled(x())
    torch.testing.assert_close(compiled(x()), expected + 1)


def test_a_graph_around_a_model_never_follows_the_choice_of_another() -> None:
    """Before PyTorch 2.14, which cannot see in a graph who has chosen, it is refused."""
    model = net()
    expected = convlora.activate(model, "snow")(x())
    compiled = torch.compile(lambda x: model(x) + 1, backend="eager", fullgraph=True)
    found: list[Tensor | Exception] = []

    def run() -> None:
        try:
            found.append(compiled(x()).detach())
        except Exception as error:
            found.append(error)

    with convlora.using(model, "rain"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    if oracle.TORCH >= (2, 14):
        torch.testing.assert_close(found[0], expected + 1)
    else:
        assert isinstance(found[0], Exception)
    torch.testing.assert_close(compiled(x()), expected + 1)


@pytest.mark.parametrize("exact", [False, True])
def test_copies_in_a_merged_model_act_live_inside(exact: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    oracle.randomise(convlora.inject(model, "0", rank=1, name="rain", modules_to_save="2"))
    with convlora.using(model, {"rain": -0.3}):
        expected = model[2].weight
    convlora.merge(model, exact=exact)
    with convlora.using(model, {"rain": -0.3}):
        assert torch.equal(model[2].weight, expected)
        assert model[2].weight.requires_grad
    with convlora.using(model, "rain"):
        assert model[2].weight.requires_grad
    assert not model[2].weight.requires_grad


def test_the_order_of_the_names_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    for name in ("rain", "snow", "night"):
        convlora.inject(model, "*", rank=2, name=name)
    oracle.randomise(model)
    strengths = {"night": 0.3, "rain": 0.7, "snow": -1.1}
    expected = convlora.activate(copy.deepcopy(model), strengths)[0].weight
    with convlora.using(model, strengths):
        assert torch.equal(model[0].weight, expected)
    assert torch.equal(convlora.merged_state_dict(model, strengths)["0.weight"], expected)

"""Answers that have first tokens in common: fed once, and each as if it had gone alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from gru_core.batch import TokenRow
from gru_core.metrics.forced import Forced, teacher_forced
from gru_core.metrics.passes import Look
from gru_core.metrics.scorer import Scorer, picked

VOCABULARY, END = 24, 3


def make(family: str) -> nn.Module:
    from transformers import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoConfig,
        GPTNeoForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )  # fmt: skip

    with torch.random.fork_rng():
        torch.manual_seed(1)
        if family == "deepseek":  # keys and values of other widths
            small = DeepseekV3Config(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=1,
                topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
                qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, initializer_range=0.5,
            )  # fmt: skip
            return DeepseekV3ForCausalLM(small).eval()
        if family == "gpt2":
            small = GPT2Config(
                vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5
            )
            return GPT2LMHeadModel(small).eval()
        if family == "gpt_neo":  # every second layer sees 4 tokens back
            layers = [[["global", "local"], 1]]
            small = GPTNeoConfig(
                vocab_size=VOCABULARY, max_position_embeddings=64, hidden_size=32, num_layers=2, num_heads=4,
                attention_types=layers, window_size=4, initializer_range=0.5,
            )  # fmt: skip
            return GPTNeoForCausalLM(small).eval()
        small = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.5,
        )  # fmt: skip
        return LlamaForCausalLM(small).eval()


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neo", "deepseek"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return make(request.param)


def tree(seed: int, prompts: int = 4) -> list[TokenRow]:
    """Rows that leave each other anywhere: at once, in the middle, at the closing token; or that go on where another
    ends, which happens to rows without one. Prompts of 1 to 5 tokens."""
    draw = random.Random(seed)
    rows: dict[tuple[int, ...], TokenRow] = {}
    for p in range(prompts):
        prompt = [2, *(draw.randrange(4, VOCABULARY) for _ in range(p + seed % 2))]
        answers = [[draw.randrange(4, VOCABULARY) for _ in range(draw.randrange(1, 9))]]
        for _ in range(5):
            other = draw.choice(answers)
            own = [draw.randrange(4, VOCABULARY) for _ in range(draw.randrange(0, 7))]
            answers.append([*other[: draw.randrange(0, len(other) + 1)], *own] or [4])
        for answer in answers:
            closed = draw.random() < 0.6
            ids = (*prompt, *answer, *([END] if closed else []))
            rows.setdefault(ids, TokenRow(f"row:{len(rows)}", ids, len(prompt), closed))
    return list(rows.values())


def same(a: Forced, b: Forced) -> None:
    assert set(a) == set(b)
    for row, x in a.items():
        y = b[row]
        assert (x.hits, x.scores.tokens) == (y.hits, y.scores.tokens), row
        assert x.hits is None or (x.led, x.next) == (y.led, y.next), row
        assert x.scores.nll == pytest.approx(y.scores.nll, rel=1e-5, abs=1e-5)
        assert (x.tail is None) == (y.tail is None)
        if x.tail:
            assert x.tail == pytest.approx(y.tail, rel=1e-4, abs=1e-4)


def together(model: nn.Module, asked: dict[TokenRow, Look], batch_rows: int) -> Forced:
    with torch.no_grad():
        return teacher_forced(Scorer.of(model), asked, 0, batch_rows)


def alone(model: nn.Module, asked: dict[TokenRow, Look]) -> Forced:
    """One row at a time: nothing is padded and nothing shared. As closely as can be."""
    found = {row: together(model, {row: Look.TAIL}, 1)[row] for row in asked}
    for row, look in asked.items():
        found[row] = found[row]._replace(
            hits=found[row].hits if look >= Look.HITS else None, tail=found[row].tail if look is Look.TAIL else None
        )
    return found


def hits_of(rows: list[TokenRow]) -> dict[TokenRow, Look]:
    return dict.fromkeys(rows, Look.HITS)


@pytest.mark.parametrize("batch_rows", [1, 4, 100])
@pytest.mark.parametrize("seed", range(6))
def test_rows_of_a_tree_equal_rows_alone(model: nn.Module, seed: int, batch_rows: int) -> None:
    """However closely each of them is looked at: trunks, branches, several of one prompt."""
    asked = {row: Look(n % 3) for n, row in enumerate(tree(seed))}
    same(together(model, asked, batch_rows), alone(model, asked))


@pytest.mark.parametrize("look", Look)
def test_rows_that_are_all_looked_at_alike_equal_rows_alone(model: nn.Module, look: Look) -> None:
    asked = dict.fromkeys(tree(7), look)
    same(together(model, asked, 4), alone(model, asked))


def fed(model: nn.Module, rows: list[TokenRow]) -> int:
    """Tokens that are not padding: in whole rows, which have no mask, padding is the first token again."""
    count = 0

    def watch(_module: Any, _given: Any, named: dict[str, Any]) -> None:
        nonlocal count
        ids, mask = named["input_ids"], named["attention_mask"]
        whole = ids.shape == mask.shape
        count += int(((ids != ids[:, :1]).sum() + len(ids)) if whole else mask[:, -ids.shape[1] :].sum())

    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    together(model, hits_of(rows), 100)
    hook.remove()
    return count


def row(name: str, *ids: int) -> TokenRow:
    return TokenRow(name, (2, 9, *ids, END), 2)


def test_what_answers_share_is_fed_once(model: nn.Module) -> None:
    """``a`` goes whole, 7 tokens and the closing one, and its pass tells of every other answer's first own token too.
    ``b`` ends there; of ``c`` 15 and 16 tell of what is behind them, of ``d`` 17."""
    a, b, c, d = row("a", 10, 11, 12, 13, 14), row("b", 10, 11, 12, 13), row("c", 10, 11, 15, 16), row("d", 17)
    assert fed(model, [a, b, c, d]) == 7 + 0 + 2 + 1
    assert fed(model, [a]) == 7


def test_equal_answers_to_two_prompts_are_two_trunks(model: nn.Module) -> None:
    rows = [TokenRow(f"{p} {n}", (2, p, *ids, END), 2) for p in (9, 8) for n, ids in enumerate([(10, 11), (10, 12)])]
    same(together(model, hits_of(rows), 4), alone(model, hits_of(rows)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_token_that_is_not_a_number_spoils_no_other_row(family: str) -> None:
    """Token 14 is NaN: whoever has it before its end is lost. The others keep their numbers, although they pass behind
    the cache of the one that is lost, or beside it, or end in it: a last token is not fed, nor is padding."""
    model = make(family)
    rows = [row("lost", 10, 11, 14, 12, 16), row("a", 10, 11, 12), row("b", 10, 15), row("before the end", 10, 14)]
    rows += [TokenRow(f"other {n}", (2, 8, *ids, END), 2) for n, ids in enumerate([(10, 11, 12, 13), (10, 11, 15)])]
    rows += [TokenRow("last", (2, 7, 10, 14), 2), TokenRow("last of a branch", (2, 8, 10, 14), 2)]
    before = alone(model, hits_of(rows))
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        if family == "gpt2":  # its output layer is the same tensor
            model.lm_head.weight = nn.Parameter(weight.clone())
        weight[14] = torch.nan
        found = teacher_forced(Scorer.of(model), hits_of(rows), 14, 100)
    assert {r.id for r in rows if found[r].scores.lost} == {"lost", "before the end"}
    whole = [r for r in rows if not found[r].scores.lost]
    same({r: found[r] for r in whole}, {r: before[r] for r in whole})


def test_a_cache_that_cannot_be_taken_apart_is_gone_around(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from gru_core.metrics import forced

    rows = hits_of(tree(1))
    monkeypatch.setattr(forced, "is_plain", lambda cache: False)
    same(together(model, rows, 4), alone(model, rows))


def test_no_cache_is_kept_for_branches_that_feed_nothing(model: nn.Module) -> None:
    """Choices of one token behind a long question."""
    rows = [TokenRow(str(n), (2, 9, 8, 7, n), 4) for n in range(10, 14)]
    kept: list[bool] = []
    hook = model.register_forward_pre_hook(lambda _m, _g, named: kept.append(named["use_cache"]), with_kwargs=True)
    found = together(model, hits_of(rows), 4)
    hook.remove()
    assert kept == [False]
    same(found, alone(model, hits_of(rows)))


def test_a_picked_cache_is_parts_of_its_source_and_keeps_nothing(model: nn.Module) -> None:
    ids = torch.arange(4, 16).view(2, 6)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    place, column = torch.tensor([1, 0, 1]), torch.tensor([[0, 1], [2, 5], [4, 4]])
    found = picked(cache, place, column)
    assert found.get_seq_length() == 2
    for number, (keys, values) in enumerate(before):
        own = torch.randn(3, keys.shape[1], 4, keys.shape[3]), torch.randn(3, values.shape[1], 4, values.shape[3])
        for _ in range(2):  # the second time as the first
            for made, cached, fed_behind in zip(found.update(*own, number), (keys, values), own, strict=True):
                for b in range(3):
                    assert torch.equal(made[b, :, :2], cached[place[b]][:, column[b]])
                assert torch.equal(made[:, :, 2:], fed_behind)
        assert torch.equal(cache.layers[number].keys, keys)
        assert torch.equal(cache.layers[number].values, values)


class Bare(nn.Module):
    """A model's numbers from its own output layer, which it calls in a way of its own or does not tell of."""

    def __init__(self, model: nn.Module, how: str) -> None:
        super().__init__()
        self.model, self.how, self.config = model, how, model.config

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.how == "untold" else self.model.lm_head

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool = False) -> Any:
        found = self.model.model(input_ids=input_ids, attention_mask=attention_mask)
        hidden, head = found.last_hidden_state, self.model.lm_head
        if self.how == "streams":
            logits = head(hidden[:, None].expand(-1, 2, -1, -1))[:, 0]
        elif self.how == "keyword":
            logits = head(input=hidden)
        elif self.how == "chunks":
            logits = torch.cat([head(hidden[:, :2]), head(hidden[:, 2:])], dim=1)
        else:
            logits = head(hidden)
        return type("Found", (), {"logits": logits})()


@pytest.mark.parametrize("how", ["plain", "untold", "streams", "keyword", "chunks"])
def test_logits_do_not_depend_on_how_the_output_layer_is_called(how: str) -> None:
    model, rows = make("llama"), hits_of(tree(3))
    same(together(Bare(model, how), rows, 4), alone(model, rows))


def test_the_output_layer_makes_logits_of_answer_tokens_alone(model: nn.Module) -> None:
    """Once for each token of the tree behind the prompts, as long as no two branches leave a trunk at one token."""
    rows = [row("a", 10, 11, 12, 13, 14), row("b", 10, 11, 12, 13), row("c", 10, 11, 15, 16), row("d", 17)]
    made: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _g, out: made.append(out.shape[:2].numel()))
    together(model, hits_of(rows), 100)
    hook.remove()
    assert sum(made) == 6 + 1 + 3 + 2  # a's tokens and end; of b its end; 15, 16 and the end of c; 17 and the end of d


def test_many_short_answers_to_a_prompt_keep_to_the_room(model: nn.Module) -> None:
    rows = [TokenRow(f"{p} {n}", (2, p, n), 2) for p in range(4, 10) for n in range(4, VOCABULARY)]
    made: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _g, out: made.append(out.shape[:2].numel()))
    found = together(model, hits_of(rows), 14)
    hook.remove()
    assert max(made) <= 14 * 3
    same(found, alone(model, hits_of(rows)))


def test_windows_of_a_model_that_sees_are_found() -> None:
    """Their settings stand in the text part of the config."""
    from transformers import Gemma3Config, Gemma3TextConfig

    class Sees(nn.Module):
        config = Gemma3Config(text_config=Gemma3TextConfig(num_hidden_layers=2))

        def forward(self, input_ids: Any, past_key_values: Any = None, position_ids: Any = None) -> None: ...

    scorer = Scorer(Sees(), lambda **given: None, torch.device("cpu"))
    assert not scorer.continues()

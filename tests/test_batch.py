"""Rows to tokens: templates, borders, labels, padding."""

from __future__ import annotations

import copy

import pytest

from gru_core.batch import IGNORE, Row, collate, encode, prompt_and_answer
from gru_core.errors import InputError
from gru_core.logprobs import answer_counts
from tests import small

LLAMA3 = (
    "{{ bos_token }}<|sys|>Date: {{ date_string }} {% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATML = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"  # noqa: E501


def decode(tok: object, ids: object) -> str:
    return tok.decode(list(ids))  # type: ignore[attr-defined]


def test_question_and_answer() -> None:
    tok = small.tokenizer()
    row = encode(tok, Row("r", "who wrote book 3", "author 3 of town 3 wrote it"), 128)
    assert row.ids[0] == tok.bos_token_id
    assert row.ids[-1] == tok.eos_token_id
    assert row.has_eos
    assert decode(tok, row.ids[1 : row.prompt_length]).startswith("Question: who wrote book 3")
    assert decode(tok, row.ids[1 : row.prompt_length]).endswith("Answer:")
    assert decode(tok, row.ids[row.prompt_length : -1]).strip() == "author 3 of town 3 wrote it"
    assert row.answer_length == len(row.ids) - row.prompt_length


def test_the_prompt_is_the_same_whatever_the_answer() -> None:
    tok = small.tokenizer()
    rows = [encode(tok, Row("r", "who wrote book 3", a), 128) for a in ("author 3", "town 1 again", "it")]
    assert len({row.ids[: row.prompt_length] for row in rows}) == 1


def test_plain_text_carries_loss_on_every_token() -> None:
    tok = small.tokenizer()
    row = encode(tok, Row("r", "", "author 3 of town 3", kind="text"), 128)
    assert row.prompt_length == 1
    assert row.answer_length == len(row.ids) - 1


def test_completion_is_joined_as_it_is() -> None:
    tok = small.tokenizer()
    prompt_ids, answer_ids = prompt_and_answer(tok, Row("r", "who wrote", "book 3", kind="completion"))
    assert decode(tok, prompt_ids[1:]).strip() == "who wrote"
    assert decode(tok, answer_ids[:-1]).strip() == "book 3"


@pytest.mark.parametrize("template", [LLAMA3, CHATML])
def test_chat_templates(template: str) -> None:
    tok = copy.deepcopy(small.tokenizer())
    tok.chat_template = template
    tok.add_tokens(["<|user|>", "<|assistant|>", "<|system|>", "<|sys|>", "Date:", "10", "Apr", "2025"])
    row = encode(tok, Row("r", "who wrote book 3", "author 3"), 128, system_prompt="town 1")
    prompt, answer = decode(tok, row.ids[: row.prompt_length]), decode(tok, row.ids[row.prompt_length :])
    assert prompt.replace("<unk>", "").rstrip().endswith("<|assistant|>")  # a word tokenizer has no newline
    assert "<|system|>" in prompt or template is LLAMA3
    assert "1</s>" in prompt, "the system prompt is in front"
    assert answer.replace(" ", "").endswith("</s>")
    assert row.has_eos, "the turn's closing token is the last one, without the template's newline"
    assert ("2025" in prompt) == (template is LLAMA3), "a template with a clock gets a fixed date"


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tok = copy.deepcopy(small.tokenizer())
    tok.chat_template = "{{ messages | length }}{{ messages[0].content }}"
    with pytest.raises(InputError, match="does not keep the prompt as a prefix"):
        encode(tok, Row("r", "who", "author"), 128)


def test_truncation_and_empty_answers() -> None:
    tok = small.tokenizer()
    long = Row("forget:3", "who wrote book 3", "author 3 of town 3 wrote it")
    whole = encode(tok, long, 128)
    cut = encode(tok, long, len(whole.ids) - 1)
    assert not cut.has_eos
    assert cut.ids == whole.ids[:-1]
    with pytest.raises(InputError, match="row forget:3: no answer token within 4 tokens") as error:
        encode(tok, long, 4)
    assert "wrote" not in str(error.value), "texts stay out of errors"
    assert "wrote" not in repr(long)


def test_collate_labels_only_answers() -> None:
    rows = small.token_rows()[:5]
    batch = collate(rows, [7, 8, 9, 10, 11], pad_id=0)
    assert batch.index_B.tolist() == [7, 8, 9, 10, 11]
    for b, row in enumerate(rows):
        n = len(row.ids)
        assert batch.ids_BT[b, :n].tolist() == list(row.ids)
        assert batch.mask_BT[b].sum() == n
        assert (batch.labels_BT[b, : row.prompt_length] == IGNORE).all()
        assert batch.labels_BT[b, row.prompt_length : n].tolist() == list(row.ids[row.prompt_length :])
        assert (batch.labels_BT[b, n:] == IGNORE).all()
    assert answer_counts(batch.labels_BT).tolist() == [r.answer_length for r in rows]

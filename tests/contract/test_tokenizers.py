"""Both kinds of tokenizers keep one contract."""

import io
import json
import pickle

import pytest
import sentencepiece

pytest.importorskip("transformers")
import tokenizers
from transformers import PreTrainedTokenizerFast

from chatlearn.data.tokenizer import load_tokenizer
from chatlearn.errors import ConfigError, DataError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "1+2="}]
LINES = [f"{a}+{b}={a + b}" for a in range(20) for b in range(20)]
LINES += ["<user>1<assistant>2", "<system>"] * 3


def make_sentencepiece(folder):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        model_type="char",
        vocab_size=29,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    (folder / "t.model").write_bytes(model.getvalue())
    (folder / "chat.jinja").write_text(TEMPLATE)
    return folder / "t.model", str(folder / "chat.jinja")


def make_huggingface(folder, *, template=TEMPLATE, begins=True, **generation):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    inner.decoder = tokenizers.decoders.Fuse()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=special)
    inner.train_from_iterator(LINES, trainer)
    if begins:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|end|>"],
        padding_side="left",
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder, None


MAKERS = {"sentencepiece": make_sentencepiece, "huggingface": make_huggingface}


@pytest.fixture(params=MAKERS)
def tokenizer(request, tmp_path):
    return load_tokenizer(*MAKERS[request.param](tmp_path))


def test_text_survives(tokenizer):
    ids = tokenizer.encode("12+7=19")
    assert tokenizer.decode(ids) == "12+7=19"
    assert all(0 <= number < tokenizer.vocab_size for number in ids)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_control_tokens_are_numbers_without_text(tokenizer):
    controls = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]
    assert controls == [0, 1, 2]
    assert tokenizer.stop_ids[0] == tokenizer.eos_id
    assert tokenizer.decode([1, *tokenizer.encode("1+1="), 2, 99999]) == "1+1="
    assert tokenizer.padding_side in ("left", "right")


def test_a_chat_begins_once_and_ends_with_what_begins_the_answer(tokenizer):
    ids = tokenizer.render_chat(MESSAGES, add_generation_prompt=True)
    assert ids.count(tokenizer.bos_id) == 1
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids) == "<user>1+2=<assistant>"
    answered = [*MESSAGES, {"role": "assistant", "content": "3"}]
    whole = tokenizer.render_chat(answered, add_generation_prompt=False)
    assert whole[: len(ids)] == ids
    assert whole[-1] == tokenizer.eos_id


def test_it_goes_to_workers_by_its_path(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("3+4=") == tokenizer.encode("3+4=")
    assert again.render_chat(MESSAGES, add_generation_prompt=True) == tokenizer.render_chat(
        MESSAGES, add_generation_prompt=True
    )


def test_generation_config_adds_stop_tokens(tmp_path):
    folder, _ = make_huggingface(tmp_path, eos_token_id=[2, 4])
    assert load_tokenizer(folder).stop_ids == (2, 4)


def test_a_stop_token_outside_the_vocabulary_is_refused(tmp_path):
    folder, _ = make_huggingface(tmp_path, eos_token_id=4000)
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id \[4000\] lies out"):
        load_tokenizer(folder)


def test_a_begin_token_that_texts_do_not_get_is_none(tmp_path):
    folder, _ = make_huggingface(tmp_path, begins=False)
    assert load_tokenizer(folder).bos_id == -1


def test_another_template_counts_for_a_folder_too(tmp_path):
    folder, _ = make_huggingface(tmp_path)
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}")
    found = load_tokenizer(folder, str(tmp_path / "other.jinja"))
    assert found.decode(found.render_chat(MESSAGES, add_generation_prompt=True)) == "1+2="


def test_what_is_missing_is_named(tmp_path):
    folder, _ = make_huggingface(tmp_path, template=None)
    with pytest.raises(DataError, match="has no chat template: set runtime.chat_template"):
        load_tokenizer(folder).render_chat(MESSAGES, add_generation_prompt=True)
    with pytest.raises(ConfigError, match="chat template .*absent.jinja cannot be read"):
        load_tokenizer(folder, str(tmp_path / "absent.jinja"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError):
        load_tokenizer(tmp_path)


def test_a_template_that_refuses_is_an_error_of_the_data(tmp_path):
    path, _ = make_sentencepiece(tmp_path)
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('no system') }}")
    with pytest.raises(DataError, match="strict.jinja refuses the messages: no system"):
        load_tokenizer(path, str(tmp_path / "strict.jinja")).render_chat(
            MESSAGES, add_generation_prompt=True
        )
    (tmp_path / "evil.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError):
        load_tokenizer(path, str(tmp_path / "evil.jinja")).render_chat(
            MESSAGES, add_generation_prompt=True
        )

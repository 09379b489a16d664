"""The sentencepiece tokenizer, trained on a few lines here."""

import io
import pickle

import pytest
import sentencepiece

from chatlearn.data.tokenizer import SentencePieceTokenizer, check_prompt_length
from chatlearn.errors import DataError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{a}+{b}={a + b}" for a in range(20) for b in range(20)]),
        model_writer=model,
        model_type="char",
        vocab_size=17,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    file = tmp_path_factory.mktemp("tokenizer") / "digits.model"
    file.write_bytes(model.getvalue())
    return file


def test_text_survives_encoding_and_decoding(path):
    tokenizer = SentencePieceTokenizer(path)
    token_ids = tokenizer.encode("12+7=19")
    assert tokenizer.decode(token_ids) == "12+7=19"
    assert all(4 <= token < tokenizer.vocab_size for token in token_ids)


def test_control_tokens_are_known_and_have_no_text(path):
    tokenizer = SentencePieceTokenizer(str(path))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 17
    assert tokenizer.decode([1, *tokenizer.encode("1+1="), 2]) == "1+1="


def test_tokens_beyond_the_vocabulary_have_no_text(path):
    tokenizer = SentencePieceTokenizer(path)
    assert tokenizer.decode([*tokenizer.encode("1+1="), 99]) == "1+1="


def test_it_pickles_by_its_path(path):
    tokenizer = SentencePieceTokenizer(path)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.path == str(path)
    assert again.encode("3+4=") == tokenizer.encode("3+4=")


def test_a_missing_file_and_one_of_another_kind_are_named(tmp_path):
    with pytest.raises(DataError, match="tokenizer file .*none.model does not exist"):
        SentencePieceTokenizer(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(DataError, match="text.model is no sentencepiece model"):
        SentencePieceTokenizer(tmp_path / "text.model")


def test_a_prompt_leaves_room_for_a_response():
    check_prompt_length(7, 8, "row 1.0")
    message = "row 1.0 has 8 tokens; with max_sequence_length=8 a prompt may have at most 7"
    with pytest.raises(DataError, match=message):
        check_prompt_length(8, 8, "row 1.0")

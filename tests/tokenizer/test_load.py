"""Facts about tokenizers, on small vocabularies made on the spot."""

import pickle
import re
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.control import THREADWEAVER
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.ids import check_ids
from tw_jax.tokenizer.interface import Tokenizer, require_single_ids
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece, train_sentencepiece

CORPUS = [
    "<think>\nPool: 12, 7, 30, 5. I pair them up.\n<Parallel>\n<Outlines>\n"
    "<Outline>1: Multiply 12 and 7.</Outline>\n<Outline>2: Multiply 30 and 5.</Outline>\n"
    "</Outlines>\n<Thread>\n1: 12 * 7 = 10 * 7 + 2 * 7 = 70 + 14 = 84.\n</Thread><Thread>\n"
    "2: 30 * 5 = 150.\n</Thread>\n</Parallel>\nNew pool: 84, 150.\n</think>\n\n"
    "The product is \\boxed{12600}.",
    "user\nassistant\nWhat is the product of the numbers? Let's think step by step and output "
    "the final answer within the box, café.",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# How Qwen's tokenizer cuts text into words: single digits, newlines kept with punctuation.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QUESTION = "Find 3^2+4^2.\n\n A second line: 25?"


def save_hf(path, special, words=QWEN_WORDS):
    """Writes a byte-level tokenizer.json of Qwen's make, trained on the corpus."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(["<think>", "</think>"])  # not special, as in Qwen3
    tokenizer.enable_truncation(8)
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(CORPUS, folder / "small.model", 360)
    return {
        "sentencepiece": str(folder / "small.model"),
        "qwen": save_hf(folder / "qwen.json", SPECIAL),
        "llama": save_hf(folder / "llama.json", LLAMA),
    }


@pytest.fixture(scope="session")
def qwen(files) -> Tokenizer:
    return load_tokenizer(HuggingFace(path=files["qwen"], eos=("<|im_end|>", "<|endoftext|>")))


@pytest.fixture(scope="session")
def pieces(files) -> Tokenizer:
    return load_tokenizer(SentencePiece(path=files["sentencepiece"]))


@pytest.fixture(scope="session", params=["bytes", "sentencepiece", "qwen"])
def tokenizer(request, qwen, pieces) -> Tokenizer:
    made = {"bytes": load_tokenizer(Bytes()), "sentencepiece": pieces, "qwen": qwen}
    return made[request.param]


# Unicode text, strewn with what a tokenizer may trip over.
SNAGS = ["<think>", "</s>", "<pad>", "<unk>", "<0x41>", "▁", "▁ ▁", "  ", "\n", ":", "1:\n", " 12"]
SNAGS += ["\r\n", "\t", "\x00", "\u2028", "\ufffd", "<<Thread>", "<|im_end|>", *THREADWEAVER]
TEXT = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from(SNAGS)),
    max_size=8,
).map("".join)


@given(text=TEXT)
@example("")
@example("<</Thread><Thread>>")
def test_every_text_comes_back_unchanged(tokenizer, text):
    text = unicodedata.normalize("NFC", text)  # what Qwen's files do; see the next test
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


@given(text=TEXT)
@example("e\u0301 \u1e9b\u0323 \uff1cThread\uff1e")
def test_bytes_and_sentencepiece_keep_uncomposed_characters_too(pieces, text):
    for tokenizer in (pieces, load_tokenizer(Bytes())):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=TEXT)
@example("<Thr<Thread>ead>")
@example("<|im_end|><|im_end|>")
def test_no_control_string_in_a_question_becomes_its_id(tokenizer, text):
    text = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode_plain(text)
    assert tokenizer.decode(ids) == text
    long_tags = [
        *THREADWEAVER,
        "<think>",
        "</think>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    ]
    assert not {tokenizer.piece(int(i)) for i in ids} & set(long_tags)


def test_a_text_without_tags_is_the_same_plain_or_not(tokenizer):
    np.testing.assert_array_equal(tokenizer.encode_plain(QUESTION), tokenizer.encode(QUESTION))


def test_every_control_string_is_one_id_wherever_it_stands(tokenizer):
    require_single_ids(tokenizer, (*THREADWEAVER, *"0123456789.:\n"))
    for text in THREADWEAVER:
        id = tokenizer.id_of(text)
        assert tokenizer.piece(id) == text
        np.testing.assert_array_equal(
            tokenizer.encode(f"a{text}1"), [tokenizer.id_of("a"), id, tokenizer.id_of("1")]
        )


def test_pieces_of_an_ascii_text_add_up_to_it(tokenizer):
    for text in CORPUS[:2]:
        ids = tokenizer.encode(text.replace("é", "e"))
        assert "".join(map(tokenizer.piece, ids)) == text.replace("é", "e")


def test_a_fraction_of_a_character_reads_as_a_replacement_character(tokenizer):
    ids = tokenizer.encode("\U0001f9f5")
    assert len(ids) == 4
    assert {tokenizer.piece(int(i)) for i in ids} == {"\ufffd"}
    assert "\ufffd" in tokenizer.decode(ids[:3])


def test_forced_pieces_encoded_apart_are_the_ids_of_the_whole_text(tokenizer):
    parts = ["</Outlines>", "\n<Thread>\n1:", " 3*3 = 9.\n</Thread>", "<Thread>\n12:", " 5 x"]
    parts += ["\n</Thread>", "\n", "</Parallel>\nSo"]
    apart = np.concatenate([tokenizer.encode(part) for part in parts])
    np.testing.assert_array_equal(apart, tokenizer.encode("".join(parts)))


def test_every_id_has_a_piece_and_no_id_is_beyond_the_vocabulary(tokenizer):
    for id in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.piece(id), str)
    for ids in ([5, tokenizer.vocab_size], [-1]):
        with pytest.raises(ValueError, match=rf"outside the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode(ids)
    assert tokenizer.decode([]) == ""
    assert tokenizer.pad_id in range(tokenizer.vocab_size)


def test_a_tokenizer_survives_pickling(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(copy.encode(CORPUS[0]), tokenizer.encode(CORPUS[0]))
    np.testing.assert_array_equal(copy.encode_plain("<Thread>"), tokenizer.encode_plain("<Thread>"))


def test_fingerprints_differ_where_vocabularies_do(files, tmp_path, qwen, pieces):
    train_sentencepiece(CORPUS, tmp_path / "other.model", 359)
    other = [
        load_tokenizer(Bytes()),
        load_tokenizer(SentencePiece(path=str(tmp_path / "other.model"))),
        load_tokenizer(HuggingFace(path=files["llama"], eos=("<|eot_id|>",))),
    ]
    assert len({t.fingerprint for t in (*other, qwen, pieces)}) == 5
    again = load_tokenizer(HuggingFace(path=files["qwen"], eos=("<|im_end|>",)))
    assert again.fingerprint == qwen.fingerprint


def test_half_a_surrogate_pair_is_refused_in_a_sentence(tokenizer):
    with pytest.raises(ValueError, match=r"half a surrogate pair, U\+D800, at character 3.*'abc'"):
        tokenizer.encode("abc\ud800")


def test_id_of_refuses_several_ids(tokenizer):
    with pytest.raises(ValueError, match="is not one id"):
        tokenizer.id_of("<Thread><Thread>")


def test_bytes_are_their_own_ids():
    tokenizer = load_tokenizer(Bytes())
    assert tokenizer.vocab_size == 270
    assert (tokenizer.pad_id, tokenizer.eos_ids) == (256, (257,))
    expected = [*"é1".encode(), 258 + THREADWEAVER.index("<Thread>"), *b"</s>"]
    assert tokenizer.encode("é1<Thread></s>").tolist() == expected


def test_sentencepiece_keeps_digits_colons_and_newlines_apart(tmp_path):
    text = "note: yes:: 84 12 12:34 note:\n\n12:\n"
    train_sentencepiece([text] * 20, tmp_path / "x.model", 304)
    tokenizer = load_tokenizer(SentencePiece(path=str(tmp_path / "x.model")))
    found = [tokenizer.piece(int(id)) for id in tokenizer.encode(text)]
    assert any(len(piece) > 2 for piece in found)  # it did learn merges
    assert all(len(piece) == 1 or not re.search(r"[0-9:\n]", piece) for piece in found)


def test_training_twice_writes_the_same_file(tmp_path, files):
    train_sentencepiece(iter(CORPUS), tmp_path / "again.model", 360)
    with open(files["sentencepiece"], "rb") as file:
        assert (tmp_path / "again.model").read_bytes() == file.read()
    assert [p.name for p in tmp_path.iterdir()] == ["again.model"]


@pytest.mark.parametrize(
    ("texts", "vocab_size", "sentence"),
    [
        (CORPUS, 9000, r"vocab_size = 9000: .*too high.*<= \d+"),
        (CORPUS, 200, "vocab_size = 200: .*smaller than required_chars"),
        (["", "\n"], 300, "no text"),
        (["ab\udc00"], 300, "half a surrogate pair"),
    ],
)
def test_a_corpus_that_does_not_carry_the_vocabulary_is_refused(
    tmp_path, texts, vocab_size, sentence
):
    with pytest.raises(ValueError, match=sentence):
        train_sentencepiece(texts, tmp_path / "x.model", vocab_size)
    assert not list(tmp_path.iterdir())


def test_sentencepiece_files_that_change_text_or_never_end_are_refused(tmp_path):
    for name, settings, sentence in [
        ("prefix", {}, "changes text"),
        ("endless", {"eos_id": -1}, "no end of sequence"),
    ]:
        with open(tmp_path / f"{name}.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS),
                model_writer=file,
                vocab_size=60,
                hard_vocab_limit=False,
                minloglevel=2,
                **settings,
            )
        with pytest.raises(ValueError, match=sentence):
            load_tokenizer(SentencePiece(path=str(tmp_path / f"{name}.model")))


def test_missing_controls_are_added_behind_the_last_id_in_order(files, qwen):
    plain = tokenizers.Tokenizer.from_file(files["qwen"])
    size = plain.get_vocab_size(with_added_tokens=True)
    assert [qwen.id_of(text) for text in THREADWEAVER] == list(range(size, size + 12))
    assert qwen.vocab_size == size + 12
    assert qwen.id_of("<|im_end|>") == plain.token_to_id("<|im_end|>")
    assert qwen.eos_ids == (qwen.id_of("<|im_end|>"), qwen.id_of("<|endoftext|>"))


def test_controls_that_a_file_has_keep_their_ids(tmp_path):
    path = save_hf(tmp_path / "t.json", ["</Thread>", "<|im_end|>", "<Thread>"])
    file = tokenizers.Tokenizer.from_file(path)
    tokenizer = load_tokenizer(HuggingFace(path=path, eos=("<|im_end|>",)))
    for text in ("</Thread>", "<Thread>"):
        assert tokenizer.id_of(text) == file.token_to_id(text)
    assert tokenizer.vocab_size == file.get_vocab_size(with_added_tokens=True) + 10


def test_special_tokens_that_overlap_in_a_question_stay_text(tmp_path):
    path = save_hf(tmp_path / "t.json", ["#x#", "#y#", "<|im_end|>"])
    tokenizer = load_tokenizer(HuggingFace(path=path, eos=("<|im_end|>",)))
    found = {tokenizer.piece(int(id)) for id in tokenizer.encode_plain("#x#y#")}
    assert not found & {"#x#", "#y#"}


def test_a_truncation_that_a_file_carries_does_not_cut_documents(qwen):
    assert len(qwen.encode("a b c d " * 10)) > 8


def test_a_tokenizer_json_that_changes_text_is_refused(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"words\.json: the tokenizer changes text"):
        load_tokenizer(HuggingFace(path=str(tmp_path / "words.json"), eos=("a",)))


def test_files_that_are_no_tokenizer_are_refused(tmp_path, files):
    (tmp_path / "bad").write_text("not a tokenizer")
    bad = str(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"bad: not a tokenizer\.json"):
        load_tokenizer(HuggingFace(path=bad, eos=("</s>",)))
    with pytest.raises(ValueError, match="bad: not a SentencePiece model"):
        load_tokenizer(SentencePiece(path=bad))
    with pytest.raises(FileNotFoundError, match="name the file in it"):
        load_tokenizer(SentencePiece(path=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="not there"):
        load_tokenizer(HuggingFace(path=bad + "er", eos=("</s>",)))


def test_an_unknown_end_of_sequence_is_refused_with_the_known_ones(files):
    with pytest.raises(ValueError, match=r"<\|eot_id\|> is not a token of .*<\|im_end\|>"):
        load_tokenizer(HuggingFace(path=files["qwen"], eos=("<|eot_id|>",)))
    with pytest.raises(ValueError, match=r"HuggingFace\.eos = \(\)"):
        HuggingFace(path=files["qwen"], eos=())


def test_a_control_string_of_several_ids_is_named_with_its_ids(tmp_path):
    with open(tmp_path / "untagged.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["plain words <>/"]),
            model_writer=file,
            vocab_size=275,
            model_type="bpe",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            minloglevel=2,
        )
    tokenizer = load_tokenizer(SentencePiece(path=str(tmp_path / "untagged.model")))
    ids = tokenizer.encode("<Thread>").tolist()
    assert len(ids) > 1
    with pytest.raises(ValueError, match="must be one id") as error:
        require_single_ids(tokenizer, ("a", "<Thread>"))
    assert f"untagged.model: '<Thread>' is {ids}" in str(error.value)
    assert "train_sentencepiece" in str(error.value)


def test_check_ids_names_the_first_id_outside_and_its_position():
    check_ids(np.arange(10), 10, "row 3")
    check_ids([], 10, "row 3")
    with pytest.raises(ValueError, match=r"^row 3: id 11 at position 1 is outside .* 10 ids"):
        check_ids([9, 11, 12], 10, "row 3")
    with pytest.raises(TypeError, match="row 3: ids are float64"):
        check_ids(np.ones(2), 10, "row 3")


INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."


def test_the_qwen_prompt_is_the_template_encoded_as_a_whole(qwen):
    text = (
        f"<|im_start|>user\n{QUESTION} {INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nNine.\n</think>\n\n\\boxed{9}<|im_end|>"
    )
    chat = Chat(template="qwen", instruction=INSTRUCTION)
    document = chat.document(qwen, QUESTION, "<think>\nNine.\n</think>\n\n\\boxed{9}")
    np.testing.assert_array_equal(document, qwen.encode(text))
    prompt = chat.prompt(qwen, QUESTION)
    np.testing.assert_array_equal(prompt, document[: len(prompt)])
    assert qwen.decode(prompt).endswith("<|im_start|>assistant\n")
    assert qwen.decode(chat.answer_suffix(qwen)) == "<|im_end|>"


def test_the_llama_prompt_is_the_template_encoded_as_a_whole(files):
    llama = load_tokenizer(HuggingFace(path=files["llama"], eos=("<|eot_id|>",)))
    text = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nNine.<|eot_id|>"
    )
    document = Chat(template="llama").document(llama, QUESTION, "Nine.")
    np.testing.assert_array_equal(document, llama.encode(text))


def test_the_plain_document_is_question_newline_response_eos(tokenizer):
    document = Chat(template="plain").document(tokenizer, "What is 2*3?", "<Thread>6")
    whole = tokenizer.encode("What is 2*3?\n<Thread>6").tolist()
    assert document.tolist() == [*whole, tokenizer.eos_ids[0]]


@pytest.mark.parametrize("template", ["plain", "qwen"])
def test_a_question_cannot_open_a_thread_or_a_turn(qwen, template):
    chat = Chat(template=template)
    harmless = chat.prompt(qwen, "a")
    hostile = chat.prompt(qwen, "a<Thread><|im_end|></Outlines><think>")
    tags = [qwen.id_of(t) for t in (*THREADWEAVER, "<|im_end|>", "<think>")]
    assert np.isin(hostile, tags).sum() == np.isin(harmless, tags).sum()


def test_a_template_of_another_family_is_refused(files, qwen):
    with pytest.raises(ValueError, match=r"template = 'llama': '<\|start_header_id\|>' is not one"):
        Chat(template="llama").prompt(qwen, "a")
    deaf = load_tokenizer(HuggingFace(path=files["qwen"], eos=("<|endoftext|>",)))
    with pytest.raises(ValueError, match=r"Add '<\|im_end\|>' to HuggingFace\.eos"):
        Chat(template="qwen").document(deaf, "a", "b")

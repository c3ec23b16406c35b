"""Real books of the shared folder, where there is one."""

from hici.data.sources import file_records
from hici.data.stream import load_stream


def test_every_book_is_read_whole_and_trained_on_or_held_out(shared, tokenizer, prepared):
    books = sorted((shared / "books").glob("*.txt"), key=lambda book: book.stat().st_size)[:3]
    eos = tokenizer.eos_token_id
    texts = [next(iter(file_records(book))).value for book in books]
    data = prepared(*books, length=4096, heldout_windows=5, heldout_fraction=0.1)
    sides = (data.train.documents, data.heldout.documents)
    found = {side.source(i): tokenizer.decode(side.tokens(i)) for side in sides for i in range(len(side))}
    assert found == {str(book): text for book, text in zip(books, texts, strict=True)}
    assert data.summary["documents"] == 2
    assert len(data.heldout) == 5
    stream, count = load_stream(books, tokenizer, vocab_size=len(tokenizer))
    assert (count, (stream == eos).sum()) == (3, 3)
    assert tokenizer.decode(stream) == "</s>".join([*texts, ""])


def test_golden_numbers_are_the_shared_ones(shared):
    from helpers import GOLDEN

    files = [file for file in GOLDEN.rglob("*") if file.is_file()]
    assert len(files) > 20
    for file in files:
        assert file.read_bytes() == (shared / "golden" / file.relative_to(GOLDEN)).read_bytes(), file.name

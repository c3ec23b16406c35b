"""Real books of the shared folder, where there is one."""

from hici.data.documents import load_documents
from hici.data.packing import split_documents, token_stream


class Bytes:
    eos_token_id = 256

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": list(text.encode())}


def test_every_book_is_read_whole(shared):
    books = sorted((shared / "books").glob("*.txt"))
    documents = load_documents(shared / "books", Bytes(), vocab_size=257)
    assert [len(d.tokens) for d in documents] == [book.stat().st_size for book in books]
    train, heldout = split_documents(documents, 0.05)
    assert len(token_stream(train, 256)) + len(token_stream(heldout, 256)) == sum(
        book.stat().st_size + 1 for book in books
    )
    assert heldout


def test_golden_numbers_are_the_shared_ones(shared):
    from helpers import GOLDEN

    files = [file for file in GOLDEN.rglob("*") if file.is_file()]
    assert len(files) > 20
    for file in files:
        assert file.read_bytes() == (shared / "golden" / file.relative_to(GOLDEN)).read_bytes(), file.name

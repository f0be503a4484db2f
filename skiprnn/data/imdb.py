"""IMDb sentiment: is a film review positive? (Maas et al. 2011; [SKIP] appendix B)"""

import gzip
import logging
import os
import re
import tarfile
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import train_test_split
from torch import Tensor

from skiprnn.data.base import MIRROR, PACKED, DataError, Source, Split, StoredData, fetch, read_npz, replacing, seeded

OFFICIAL = Source(
    "imdb/aclImdb_v1.tar.gz",
    "7c2ac02c03563afcf9b574c7e56c153a",
    ["https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"],
)
LABELLED = Source("imdb/aclImdb_labelled.tar.gz")  # the same without the unlabelled half, as a mirror may hold it
LARGEST = 2**30  # bytes that an archive may unpack to: of the 50,000 labelled reviews it is 0.1 GB
LONGEST = 2**20  # bytes of a review; the longest has 13,704
REVIEW = re.compile(r"(?:.*/)?((?:train|test)/(?:neg|pos)/(\d+)_\d+\.txt)")
CLASSES = ("neg", "pos")
SPLIT_SEED = 0  # fixed, so that every run is judged on the same reviews
VALIDATION_SHARE = 0.15
PADDING, UNKNOWN = 0, 1  # token ids
SPECIAL_TOKENS = ["[PAD]", "[UNK]"]
TOKEN = r"\w+(?:'\w+)*|[^\w\s]"  # a word with its apostrophes, or a punctuation mark
INITIAL_RANGE = 0.25  # of the embedding of a word without a vector

log = logging.getLogger(__name__)


class IMDb(StoredData):
    """Token ids of a review's first T tokens, (N, T) int64; classes negative and positive; 21,250 / 3,750 / 25,000.

    Validation is a fixed, stratified 15 % of the training reviews; the vocabulary comes from the other 85 %. Ids: 0
    padding, 1 any word outside the vocabulary, then the words from the most frequent to the rarest. Reviews come from
    an unpacked `imdb/aclImdb/` folder below root or SKIPRNN_MIRROR, or else from an archive, which is read without
    being unpacked. Tokenised reviews are kept under root.

    Args:
        length: T. Longer reviews are cropped, shorter ones padded.
        vocabulary_size: token ids at most, padding and unknown included.
        min_count: times that a word must occur in the training split to be in the vocabulary.
        lowercase: whether case is ignored.
        padding: the side that is padded, "left" or "right".
        mask_padding: give the lengths, so that the model stops at the padding; otherwise padded steps count like all
            others, as in the paper. Needs padding on the right.
        vectors: a file below root, or its full path, that `embeddings` starts from; in word2vec's format (binary if its
            name contains .bin, else text; either may end in .gz).
        reviews_per_class: what each of the four folders must hold; anything else is refused as incomplete.
        batch_size, seed, root, drop_last: see SequenceData.

    Raises:
        ValueError: an argument out of its range.
    """

    input_size, outputs, task = 1, 2, "classification"  # one token id per step
    vocabulary_size: int

    def __init__(
        self,
        length: int = 200,
        vocabulary_size: int = 20_000,
        min_count: int = 1,
        lowercase: bool = True,
        padding: str = "left",
        mask_padding: bool = False,
        vectors: str | None = None,
        reviews_per_class: int = 12_500,
        batch_size: int = 256,
        seed: int = 0,
        root: str = "data",
        drop_last: bool = False,
    ):
        super().__init__(batch_size, seed, root, drop_last)
        for name, value, least, most in [
            ("length", length, 1, 2**16),
            ("vocabulary_size", vocabulary_size, 3, 2**24),
            ("min_count", min_count, 1, 2**31),
            ("reviews_per_class", reviews_per_class, 1, 2**24),
        ]:
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
            if value > most:
                raise ValueError(f"{name} must be at most {most}; got {value}")
        if padding not in ("left", "right"):
            raise ValueError(f'padding must be "left" or "right"; got {padding!r}')
        if mask_padding and padding == "left":
            raise ValueError("mask_padding needs padding on the right: lengths count from the first step")
        self.steps, self.vocabulary_size, self.min_count, self.lowercase = length, vocabulary_size, min_count, lowercase
        self.padding, self.mask_padding, self.vectors = padding, mask_padding, vectors
        self.reviews_per_class = reviews_per_class
        steps = "do not count" if mask_padding else "count as all others"
        start = "a word2vec file" if vectors else f"U(-{INITIAL_RANGE}, {INITIAL_RANGE})"
        self.note = f"padded on the {padding}, padded steps {steps}; embeddings start from {start}"
        validation = round(VALIDATION_SHARE * 2 * reviews_per_class)
        self.examples = {
            "train": 2 * reviews_per_class - validation,
            "validation": validation,
            "test": 2 * reviews_per_class,
        }

    def settings(self) -> tuple:
        return self.tokens_file.name, self.steps, self.padding, self.mask_padding

    @property
    def tokens_file(self) -> Path:
        """Tokenised reviews; every setting that they depend on is in the name."""
        case = "lower" if self.lowercase else "cased"
        settings = f"{self.vocabulary_size}-{self.min_count}-{case}-{self.reviews_per_class}"
        return self.root / "imdb" / f"tokenised-{settings}.npz"

    def prepare(self) -> None:
        if is_complete(self.tokens_file):
            return
        folders = [Path(place, "imdb", "aclImdb") for place in (self.root, os.environ.get(MIRROR)) if place]
        source = next((folder for folder in folders if folder.is_dir()), None) or fetch(self.root, LABELLED, OFFICIAL)
        log.info("tokenising the reviews of %s; their tokens are kept in %s", source, self.tokens_file)
        texts, labels = self._ordered(read_reviews(source), source)
        tokens, ends, words = self._tokenised(texts)
        with replacing(self.tokens_file) as temporary:
            np.savez(
                temporary,
                tokens=tokens,
                ends=ends,
                labels=np.array(labels),
                words=np.frombuffer("\n".join(words).encode(), dtype=np.uint8),
            )

    def _ordered(self, reviews: dict[str, str], source: Path) -> tuple[list[str], list[int]]:
        """Texts and labels in the order train, validation, test."""
        parts = []
        for part in ("train", "test"):
            names: list[tuple[str, int]] = []
            for label, folder in enumerate(CLASSES):
                found = [name for name in reviews if name.startswith(f"{part}/{folder}/")]
                if len(found) != self.reviews_per_class:
                    raise DataError(
                        f"aclImdb/{part}/{folder} holds {len(found)} reviews instead of {self.reviews_per_class}: "
                        f"{source} is incomplete; delete it to fetch it again"
                    )
                names += [(name, label) for name in sorted(found, key=_review_number)]
            parts.append(names)
        if self.examples["validation"] < len(CLASSES):
            raise DataError(
                f"{self.reviews_per_class} reviews per class are too few: none would be left to validate on"
            )
        train, validation = train_test_split(
            parts[0],
            test_size=self.examples["validation"],
            stratify=[label for _, label in parts[0]],
            random_state=SPLIT_SEED,
        )
        chosen = [*train, *validation, *parts[1]]
        return [reviews[name] for name, _ in chosen], [label for _, label in chosen]

    def _tokenised(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Token ids of all texts one after another, (tokens,) int32; where each text ends; the word of every id."""
        analyse = CountVectorizer(preprocessor=self._normalised, token_pattern=TOKEN).build_analyzer()
        lexicon: defaultdict[str, int] = defaultdict(lambda: len(lexicon))  # every word that occurs, numbered
        reviews = [np.array([lexicon[word] for word in analyse(text)], dtype=np.int32) for text in texts]
        words = list(lexicon)
        counts = np.bincount(np.concatenate(reviews[: self.examples["train"]]), minlength=len(words))
        known = sorted(np.flatnonzero(counts >= self.min_count), key=lambda number: (-counts[number], words[number]))
        known = known[: self.vocabulary_size - len(SPECIAL_TOKENS)]
        ids = np.full(len(words), UNKNOWN, dtype=np.int32)
        ids[known] = np.arange(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + len(known))
        vocabulary = SPECIAL_TOKENS + [words[number] for number in known]
        return ids[np.concatenate(reviews)], np.cumsum([len(review) for review in reviews]), vocabulary

    def _normalised(self, text: str) -> str:
        text = text.replace("<br />", " ")
        return text.lower() if self.lowercase else text

    def read(self) -> dict[str, Split]:
        tokens, ends, labels, _ = self._stored()
        inputs = np.full((len(ends), self.steps), PADDING, dtype=np.int64)
        lengths = np.empty(len(ends), dtype=np.int64)
        for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            review = tokens[start : min(end, start + self.steps)]
            place = slice(len(review)) if self.padding == "right" else slice(self.steps - len(review), None)
            inputs[row, place] = review
            lengths[row] = max(1, len(review))  # a review without a token is one step of padding
        parts = list(self.examples.values())
        columns = [torch.from_numpy(column).split(parts) for column in (inputs, labels.astype(np.int64), lengths)]
        return {
            name: Split(x, y, valid if self.mask_padding else None)
            for name, x, y, valid in zip(self.examples, *columns, strict=True)
        }

    def _stored(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Tokens (tokens,), ends and labels (reviews,), and the words, checked.

        Raises:
            DataError: the file is damaged, or holds something else.
        """
        try:
            tokens, ends, labels, text = read_npz(self.tokens_file, "tokens", "ends", "labels", "words")
            words = text.tobytes().decode().split("\n")
            reviews = sum(self.examples.values())
            whole = (ends[0] >= 0) & (ends[-1] == len(tokens)) & (np.diff(ends) >= 0).all()
            known = (tokens >= 0).all() & (tokens < self.vocabulary_size).all() & np.isin(labels, (0, 1)).all()
            if not (whole and known and ends.shape == labels.shape == (reviews,)):
                raise ValueError(f"it should hold {reviews} reviews of token ids below {self.vocabulary_size}")
            if len(words) > self.vocabulary_size:
                raise ValueError(f"it holds {len(words)} words")
        except (ValueError, IndexError, TypeError) as error:
            raise DataError(f"{self.tokens_file} is damaged ({error}); delete it to make it again") from None
        return tokens, ends, labels, words

    def words(self) -> list[str]:
        """The vocabulary: the word of every token id, the special ones first."""
        self.prepare()
        return self._stored()[3]

    def embeddings(self, width: int = 300) -> Tensor:
        """Where the embedding starts: (vocabulary_size, width) float32.

        Words in the file `vectors` have their vector, all others U(-0.25, 0.25), drawn by the run's seed.

        Raises:
            DataError: the file is missing, corrupt or of another width.
        """
        table = torch.empty(self.vocabulary_size, width)
        table.uniform_(-INITIAL_RANGE, INITIAL_RANGE, generator=seeded(self.seed, "embeddings"))
        if self.vectors is None:
            return table
        try:
            from gensim.models import KeyedVectors  # here, for it is slow to import and seldom wanted

            file = self.root / self.vectors
            check_vectors(file)
            known = KeyedVectors.load_word2vec_format(str(file), binary=".bin" in file.suffixes)
        except ModuleNotFoundError:
            raise DataError("data.vectors needs gensim: pip install 'skiprnn[text]'") from None
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(f"cannot read the word2vec file {self.vectors}: {error}") from error
        if known.vector_size != width:
            raise DataError(f"{self.vectors} holds vectors of width {known.vector_size}; the embedding's is {width}")
        if not np.isfinite(known.vectors).all():
            raise DataError(f"{self.vectors} holds vectors that are nan or infinite; take another copy of it")
        rows = [(row, known[word]) for row, word in enumerate(self.words()) if word in known]
        log.info("%d of %d words have a vector in %s", len(rows), self.vocabulary_size, self.vectors)
        for row, vector in rows:
            table[row] = torch.tensor(vector)
        return table


def check_vectors(file: Path) -> None:
    """Raises ValueError unless a word2vec file can hold what its first line says: room is made for so much."""
    packed = file.suffix == ".gz"
    with gzip.open(file) if packed else file.open("rb") as content:
        words, width = map(int, content.readline(100).split())
    least = words * width * (4 if ".bin" in file.suffixes else 2)
    if words < 1 or width < 1 or least > file.stat().st_size * (PACKED if packed else 1):
        raise ValueError(f"its first line says {words} words of width {width}, more than it can hold")


class Bounded:
    """A file of which no more than `most` bytes are read, whatever asks for them.

    Raises:
        ValueError: by `read`; there are more.
    """

    def __init__(self, file: gzip.GzipFile, most: int):
        self.file, self.most = file, most

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        if self.file.tell() > self.most:
            raise ValueError(f"it holds more than {self.most:,} bytes, far more than the data set")
        return content


def read_reviews(source: Path) -> dict[str, str]:
    """The labelled reviews in an aclImdb folder or archive, by name: "train/pos/0_9.txt".

    An archive is read in memory, never unpacked: whatever paths it holds, nothing is written anywhere.

    Raises:
        DataError: the archive is truncated or no archive, or a review is not UTF-8.
    """
    try:
        if source.is_dir():
            files = {path.relative_to(source).as_posix(): path for path in source.glob("*/*/*.txt")}
            return {name: path.read_text("utf-8") for name, path in files.items() if REVIEW.fullmatch(name)}
        reviews = {}
        with gzip.open(source) as packed:  # tarfile's own decompression takes a truncated file for a short one
            raw: Any = Bounded(packed, LARGEST)
            with tarfile.open(fileobj=raw, mode="r|") as archive:
                for member in archive:
                    match = REVIEW.fullmatch(member.name)
                    if match and member.size > LONGEST:
                        raise ValueError(f"{match[1]} says it has {member.size:,} bytes, which no review has")
                    if match and (file := archive.extractfile(member)):
                        reviews[match[1]] = file.read().decode("utf-8")
            while raw.read(2**20):  # to the checksum at its end
                pass
        return reviews
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{source} is corrupt or truncated ({error}); delete it to fetch it again") from error


def is_complete(tokens_file: Path) -> bool:
    """Whether tokenised reviews are there and whole."""
    try:
        labels, ends = read_npz(tokens_file, "labels", "ends")
        return labels.shape == ends.shape
    except ValueError:
        return False


def _review_number(name: str) -> int:
    match = REVIEW.fullmatch(name)
    return int(match[2]) if match else -1

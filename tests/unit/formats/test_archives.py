"""SAELens folders, as they are and in archives, and archives that mean harm."""

import gzip
import io
import json
import os
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError, SteerError, TooLarge
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions

LIMIT = 1 << 20


def an_sae() -> SAE:
    generator = torch.Generator().manual_seed(0)
    return SAE.of(
        "standard",
        W_enc=torch.randn(4, 8, generator=generator),
        b_enc=torch.randn(8, generator=generator),
        W_dec=torch.randn(8, 4, generator=generator),
        b_dec=torch.randn(4, generator=generator),
        layer=3,
    )


def members() -> dict[str, bytes]:
    """The files that SAELens itself would write."""
    sae = an_sae()
    config = {
        "architecture": "standard",
        "d_in": 4,
        "d_sae": 8,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.3.hook_resid_post", "model_name": "demo"},
    }
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    return {"cfg.json": json.dumps(config).encode(), "sae_weights.safetensors": save(tensors)}


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def tarred(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def tar_member(name: str, kind: bytes, **fields: object) -> bytes:
    member = tarfile.TarInfo(name)
    member.type = kind
    for key, value in fields.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def read(data: bytes, folder: Path, limit: int = LIMIT):
    path = folder / "upload"
    path.write_bytes(data)
    return read_artefact(path, ImportOptions(), scratch=folder / "scratch", unpacked_limit=limit)


def refused(data: bytes, folder: Path) -> SteerError:
    inner = folder / "inner"  # around it nothing but this test writes
    inner.mkdir(exist_ok=True)
    before = {path for path in folder.rglob("*") if inner not in path.parents}
    with pytest.raises(SteerError) as raised:
        read(data, inner)
    after = {path for path in folder.rglob("*") if inner not in path.parents}
    assert after == before  # nothing outside
    assert {path.name for path in inner.iterdir()} <= {"upload", "scratch"}
    assert 400 <= raised.value.status < 500
    return raised.value


@pytest.mark.parametrize("prefix", ["", "./", "sae/", "a/b/"])
@pytest.mark.parametrize(
    "pack",
    [
        zipped,
        lambda files: zipped(files, zipfile.ZIP_STORED),
        tarred,
        lambda files: tarred(files, tarfile.GNU_FORMAT),
        lambda files: tarred(files, tarfile.USTAR_FORMAT),
        lambda files: gzip.compress(tarred(files)),
    ],
)
def test_a_saelens_folder_in_an_archive(tmp_path: Path, prefix: str, pack) -> None:
    sae = read(pack({prefix + name: data for name, data in members().items()}), tmp_path)
    assert isinstance(sae, SAE)
    assert torch.equal(sae.W_dec, an_sae().W_dec)
    assert (sae.layer, sae.card.model) == (3, "demo")
    assert not (tmp_path / "scratch.tar").exists()


def test_a_folder_packed_by_tar_itself(tmp_path: Path) -> None:
    source = tmp_path / "sae"
    source.mkdir()
    for name, data in members().items():
        (source / name).write_bytes(data)
    with tarfile.open(tmp_path / "packed", "w:gz") as archive:
        archive.add(source, ".")
    assert isinstance(read((tmp_path / "packed").read_bytes(), tmp_path), SAE)
    plain = read_artefact(source, ImportOptions(description="d"), scratch=None, unpacked_limit=0)
    assert plain.card.description == "d"


def test_no_folder_or_several(tmp_path: Path) -> None:
    assert refused(zipped({"readme": b"x"}), tmp_path).code == "unknown_layout"
    (tmp_path / "two").mkdir()
    two = {f"{place}/{name}": data for place in "ab" for name, data in members().items()}
    error = refused(zipped(two), tmp_path / "two")
    assert "several: a, b" in error.message


def test_a_folder_without_weights(tmp_path: Path) -> None:
    files = members()
    del files["sae_weights.safetensors"]
    assert "sae_weights.safetensors" in refused(zipped(files), tmp_path).message


def test_errors_do_not_tell_where_the_archive_was_unpacked(tmp_path: Path) -> None:
    error = refused(zipped({**members(), "cfg.json": b"not json"}), tmp_path)
    assert str(tmp_path) not in error.message
    assert str(tmp_path) not in str(error)


def symlink_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo("cfg.json")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return stream.getvalue()


def encrypted_zip() -> bytes:
    data = bytearray(zipped({"cfg.json": b"{}"}))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def wide_zip() -> bytes:
    """A zip whose end record promises a directory far larger than the file."""
    data = bytearray(zipped({"cfg.json": b"{}"}))
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 16] = struct.pack("<I", 1 << 30)
    return bytes(data)


def zip64_zip() -> bytes:
    data = zipped({"cfg.json": b"{}"})
    end = data.rindex(b"PK\x05\x06")
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, 1 << 40, 0)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1)
    return data[:end] + record + locator + data[end:]


def hidden_tar() -> bytes:
    """A member whose true size, in an extended header, differs from the plain header's."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("cfg.json")
        member.pax_headers = {"size": "0"}
        member.size = 512
        archive.addfile(member, io.BytesIO(tar_member("x", tarfile.SYMTYPE, linkname="/")[:512]))
    return stream.getvalue()


UNSAFE = {
    "zip: parent": zipped({"../cfg.json": b"{}"}),
    "zip: parent inside": zipped({"a/../../cfg.json": b"{}"}),
    "zip: absolute": zipped({"/tmp/cfg.json": b"{}"}),
    "zip: backslash": zipped({"..\\cfg.json": b"{}"}),
    "zip: drive": zipped({"C:cfg.json": b"{}"}),
    "zip: empty part": zipped({"a//cfg.json": b"{}"}),
    "zip: long name": zipped({"a" * 300: b"{}"}),
    "zip: deep": zipped({"a/" * 40 + "cfg.json": b"{}"}),
    "zip: file as folder": zipped({"a": b"", "a/cfg.json": b"{}"}),
    "zip: link": symlink_zip(),
    "zip: encrypted": encrypted_zip(),
    "zip: bzip2": zipped({"cfg.json": b"{}"}, zipfile.ZIP_BZIP2),
    "zip: lzma": zipped({"cfg.json": b"{}"}, zipfile.ZIP_LZMA),
    "zip: many": zipped({f"f{n}": b"" for n in range(1100)}),
    "zip: wide directory": wide_zip(),
    "zip: zip64": zip64_zip(),
    "tar: parent": tarred({"../cfg.json": b"{}"}),
    "tar: absolute": tarred({"/tmp/cfg.json": b"{}"}),
    "tar: parent in a long name": tarred({"../" + "a" * 150: b"{}"}, tarfile.GNU_FORMAT),
    "tar: twice": tarred({"cfg.json": b"{}", "./cfg.json": b"{}"}),
    "tar: link": tar_member("cfg.json", tarfile.SYMTYPE, linkname="/etc/passwd"),
    "tar: hard link": tar_member("cfg.json", tarfile.LNKTYPE, linkname="/etc/passwd"),
    "tar: device": tar_member("cfg.json", tarfile.CHRTYPE, devmajor=1, devminor=5),
    "tar: pipe": tar_member("cfg.json", tarfile.FIFOTYPE),
    "tar: sparse": tar_member("cfg.json", tarfile.GNUTYPE_SPARSE),
    "tar: many": tarred({f"f{n}": b"" for n in range(1100)}),
    "tar: 8 GiB": tar_member("cfg.json", tarfile.REGTYPE, size=1 << 34),
    "tar: wide header": tar_member("x", tarfile.XHDTYPE, size=1 << 30),
    "tar: hidden member": hidden_tar(),
}


@pytest.mark.parametrize("harm", UNSAFE)
def test_harmful_archives_are_refused(tmp_path: Path, harm: str) -> None:
    (tmp_path / "inside").mkdir()
    error = refused(UNSAFE[harm], tmp_path / "inside")
    assert isinstance(error, FileFormatError)
    assert error.code == "unsafe_archive"
    if harm.startswith("tar"):
        (tmp_path / "packed").mkdir()
        assert refused(gzip.compress(UNSAFE[harm]), tmp_path / "packed").code == "unsafe_archive"


@pytest.mark.parametrize(
    "bomb",
    [
        lambda zeros: zipped({"cfg.json": zeros}),
        lambda zeros: gzip.compress(tarred({"cfg.json": zeros})),
        lambda zeros: tarred({"cfg.json": zeros}),
    ],
)
def test_bombs_stop_at_the_limit(tmp_path: Path, bomb) -> None:
    data = bomb(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge) as raised:
            read(data, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert raised.value.code == "archive_too_large"
    assert peak < 16 << 20
    assert sum(path.stat().st_size for path in (tmp_path / "scratch").rglob("*")) <= 2 * LIMIT


def test_a_member_that_lies_about_its_size_is_counted(tmp_path: Path) -> None:
    data = bytearray(zipped({"cfg.json": bytes(8 << 20)}))
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 10)
    assert isinstance(refused(bytes(data), tmp_path), FileFormatError | TooLarge)


WHOLE = {"zip": zipped(members()), "tar": tarred(members())}
WHOLE["tar.gz"] = gzip.compress(WHOLE["tar"])


def test_a_zip_that_points_outside_of_itself(tmp_path: Path) -> None:
    data = bytearray(WHOLE["zip"])
    end = data.rindex(b"PK\x05\x06")
    # The directory's offset is larger than its place: every member would begin before byte 0.
    (offset,) = struct.unpack("<I", data[end + 16 : end + 20])
    data[end + 16 : end + 20] = struct.pack("<I", offset + 100_000)
    assert isinstance(refused(bytes(data), tmp_path), FileFormatError)


@pytest.mark.parametrize("form", WHOLE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_archives_are_refused_or_read_but_never_crash(
    tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject
) -> None:
    damaged = bytearray(WHOLE[form])
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(1, len(damaged) - 1)) :]
    folder = tmp_path_factory.mktemp("damaged")
    status = None
    try:
        assert read(bytes(damaged), folder).W_dec.isfinite().all()
    except SteerError as error:
        status = error.status
    assert status is None or 400 <= status < 500
    assert sorted(os.listdir(folder)) in (["scratch", "upload"], ["upload"])

"""Media that refer to a file of the server or an address: no decoder may follow them."""

from __future__ import annotations

import struct
from pathlib import Path

from tests.hostile.bad_clips import box, full, movie, numbers, tables, track
from tests.hostile.bad_containers import HEAD, element

_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
_SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file://%b'/><image href='%b'/></svg>"


def leading(path: Path, address: str) -> dict[str, tuple[str, bytes]]:
    """Kind and bytes of media that refer to ``path`` and ``address``, which is http://HOST:PORT/NAME."""
    file, url = str(path).encode(), address.encode()
    kinds = {
        "video": {**_boxes(file, url), **_lists(file, url)},
        "image": _pictures(file, url),
        "document": _documents(file, url),
    }
    return {f"{kind}/{name}": (kind, data) for kind, media in kinds.items() for name, data in media.items()}


def alias(path: bytes) -> bytes:
    """A Macintosh alias record of a path, as QuickTime's references have it."""
    name = path.split(b"/")[-1][:63]
    head = bytes(4) + struct.pack(">HHH", 0, 2, 0) + b"\4disk".ljust(28, b"\0") + bytes(10)
    middle = bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16) + struct.pack(">hh", 1, 1) + bytes(16)
    tail = struct.pack(">hH", 2, len(path)) + path + b"\0" * (len(path) % 2) + struct.pack(">hH", 18, 1) + b"/\0"
    return head + middle + tail + struct.pack(">hH", -1, 0)


def _boxes(file: bytes, url: bytes) -> dict[str, bytes]:
    """References to other files in QuickTime and Matroska."""

    def referring(kind: bytes, body: bytes) -> bytes:
        there = box(b"dinf", full(b"dref", numbers(1), full(kind, body)))
        return movie(track(tables(1, 1000) | {b"stco": numbers(1, 0)}, references=there))

    def described(kind: bytes, where: bytes) -> bytes:
        reference = full(b"rdrf", kind, numbers(len(where)), where)
        return box(b"ftyp", b"qt  ", numbers(0), b"qt  ") + box(b"moov", box(b"rmra", box(b"rmda", reference)))

    info = element("1549A966", element("3E83AB", file) + element("3C83AB", url))
    return {
        "dref-url-file": referring(b"url ", b"file://" + file + b"\0"),
        "dref-url-plain": referring(b"url ", file + b"\0"),
        "dref-url-http": referring(b"url ", url + b"\0"),
        "dref-urn": referring(b"urn ", b"x\0" + url + b"\0"),
        "dref-alis": referring(b"alis", alias(file)),
        "rmra-url": described(b"url ", url + b"\0"),
        "rmra-alis": described(b"alis", alias(file)),
        "matroska-linked": HEAD + element("18538067", info),
    }


def _lists(file: bytes, url: bytes) -> dict[str, bytes]:
    """Playlists and scripts in text."""
    port = url.rsplit(b":", 1)[1].split(b"/")[0]
    entity = b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY x SYSTEM 'file://%b'><!ENTITY y SYSTEM '%b'>]>" % (file, url)
    hls, end = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n", b"#EXTINF:9,\n%b\n#EXT-X-ENDLIST\n" % url
    imf = b"<CompositionPlaylist xmlns='http://www.smpte-ra.org/schemas/2067-3/2013'>&x;&y;</CompositionPlaylist>"
    sdp = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    return {
        "hls": hls + b"#EXTINF:9,\nfile://%b\n" % file + end,
        "hls-key": hls + b'#EXT-X-KEY:METHOD=AES-128,URI="file://%b"\n' % file + end,
        "hls-map": hls + b'#EXT-X-MAP:URI="file://%b"\n' % file + end,
        "hls-master": b"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n%b\n" % url,
        "concat": b"ffconcat version 1.0\nfile '%b'\nfile '%b'\n" % (file, url),
        "concat-protocol": b"ffconcat version 1.0\nfile 'concat:%b|%b'\n" % (file, file),
        "concat-subfile": b"ffconcat version 1.0\nfile 'subfile,,start,0,end,99,,:%b'\n" % file,
        "dash": entity + b"<MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>%b</BaseURL>&x;&y;</MPD>" % url,
        "smooth": entity + b"<SmoothStreamingMedia>&x;&y;</SmoothStreamingMedia>",
        "imf": entity + imf,
        "sdp": sdp + b"m=video %b RTP/AVP 96\na=rtpmap:96 H264/90000\n" % port,
        "asx": b"<asx version='3.0'><entry><ref href='%b'/><ref href='file://%b'/></entry></asx>" % (url, file),
        "reference": b"[Reference]\nRef1=%b\nRef2=%b\n" % (url, file),
        "m3u": b"%b\n%b\n" % (file, url),
        "cue": b'FILE "%b" WAVE\n  TRACK 01 AUDIO\n' % file,
        "metadata": b";FFMETADATA1\ntitle=file://%b\n" % file,
        "subtitles": b"FORMAT=25\nFILE=1\nfile://%b\n" % file,
        "avisynth": b'AVISource("%b")\n' % file,
        "svg": _SVG % (file, url),
    }


def _pictures(file: bytes, url: bytes) -> dict[str, bytes]:
    comment = b"\xff\xfe" + struct.pack(">H", len(file) + 2) + file
    return {
        "eps": _EPS + b"(%b) (r) file pop\nshowpage\n" % file,
        "eps-write": _EPS + b"(%b) (a) file dup (x) writestring closefile\nshowpage\n" % file,
        "svg": _SVG % (file, url),
        "html": b"<img src='file://%b'><img src='%b'>" % (file, url),
        "path": file,
        "address": url,
        "jpeg": b"\xff\xd8" + comment + b"\xff\xd9",
        "mvg": b"push graphic-context\nimage over 0,0 0,0 'url(%b)'\nimage over 0,0 0,0 '%b'\n" % (url, file),
    }


def _documents(file: bytes, url: bytes) -> dict[str, bytes]:
    """Streams, actions and files at other locations."""

    def document(page: bytes = b"", catalog: bytes = b"", *more: bytes) -> bytes:
        objects = [
            b"<</Type/Catalog/Pages 2 0 R%b>>" % catalog,
            b"<</Type/Pages/Count 1/Kids[3 0 R]>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]%b>>" % page,
            *more,
        ]
        body = b"".join(b"%d 0 obj\n%b\nendobj\n" % (number, one) for number, one in enumerate(objects, 1))
        return b"%PDF-1.7\n" + body + b"trailer<</Root 1 0 R>>\n%%EOF"

    def elsewhere(where: bytes, keys: bytes = b"") -> bytes:
        return b"<</Length 0/F %b%b>>stream\n\nendstream" % (where, keys)

    def action(body: bytes) -> bytes:
        return document(b"/AA<</O<<%b>>>>" % body, b"/OpenAction<<%b>>" % body)

    there, remote = b"<</Type/Filespec/F(%b)>>" % file, b"<</FS/URL/F(%b)>>" % url
    form = b"/Type/XObject/Subtype/Form/BBox[0 0 9 9]/Ref<</F %b/Page 0>>" % there
    drawn = b"/Contents 4 0 R/Resources<</XObject<</F 5 0 R>>>>"
    return {
        "stream": document(b"/Contents 4 0 R", b"", elsewhere(there)),
        "stream-address": document(b"/Contents 4 0 R", b"", elsewhere(remote)),
        "reference": document(drawn, b"", b"<</Length 5>>stream\n/F Do\nendstream", elsewhere(there, form)),
        "launch": action(b"/S/Launch/F(%b)" % file),
        "uri": action(b"/S/URI/URI(%b)" % url),
        "goto": action(b"/S/GoToR/F %b/D[0/Fit]" % there),
        "submit": action(b"/S/SubmitForm/F(%b)" % url),
        "script": action(b"/S/JavaScript/JS(app.launchURL('%b');this.getURL('%b'))" % (url, url)),
        "xfa": document(b"", b"/AcroForm<</Fields[]/XFA[(template)4 0 R]>>", elsewhere(there)),
    }

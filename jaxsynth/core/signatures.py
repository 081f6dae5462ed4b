"""What a file is that is not what its name says, by how it begins, in words for an error."""

# Downloads that failed or were not finished, archives, and files that programs of their own read.
_STARTS = {
    b"version http": "the pointer of a file that git-lfs has not fetched",
    b"<": "a text such as the page of a download that failed",
    b"{": "a JSON text",
    b"PK\3\4": "a ZIP archive, as PyTorch's files are",
    b"\x80\2": "a pickle, as PyTorch's older files are",
    b"GGUF": "a GGUF file",
    b"%PDF": "a PDF",
    b"%!PS": "a PostScript file",
    b"8BPS": "a Photoshop file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"GIF8": "a GIF picture",
    b"RIFF": "a RIFF file, such as a WebP picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"\x93NUMPY": "an array of numpy",
}
LONGEST = max(map(len, _STARTS))
# As `weights.safetensors` takes it.
_LONGEST_HEADER = 1 << 24


def named(head: bytes) -> str:
    """What a file that begins so is, "" where it is none of these."""
    # The length of a header, and the header: JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return "a safetensors file: give it the suffix .safetensors"
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \r\n\t")
    # Eight letters, which as a length would be more than any header's.
    letters = all(32 <= byte < 127 or byte in b"\r\n\t" for byte in head)
    text = "a text" if letters and len(head) >= 8 else ""
    return next((words for start, words in _STARTS.items() if head.startswith(start)), text)

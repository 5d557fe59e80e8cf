"""Where a text can be cut without changing its tokens.

GPT-2 first splits a text into words (the pattern in OpenAI's encoder.py), then merges bytes within
each word. The pattern matches from left to right and looks ahead only from white space. So a cut is
safe wherever a word ends in any context: between a letter, digit or mark and white space, between a
letter or digit and punctuation, and before the last of several spaces, which belongs to the next
word.
"""

import re

_WINDOW = 1 << 12  # bytes at the end that are searched first

# The last byte or bytes of a character before the cut. UTF-8 has white space beyond ASCII only in
# the blocks C2, E1, E2 and E3 80, which are not among these.
_VISIBLE = (
    rb"(?<=[\x21-\x7e])|(?<=[\xc3-\xdf][\x80-\xbf])|(?<=[\xe4-\xef][\x80-\xbf]{2})"
    rb"|(?<=\xe3[\x81-\xbf][\x80-\xbf])|(?<=[\xf0-\xf4][\x80-\xbf]{3})"
)
# ASCII, U+5000 to U+8FFF (all letters), kana, and Hangul from U+B000 to U+CFFF.
_LETTER = (
    rb"(?<=[0-9A-Za-z])|(?<=[\xe5-\xe8][\x80-\xbf]{2})|(?<=[\xeb\xec][\x80-\xbf]{2})"
    rb"|(?<=\xe3\x81[\x81-\xbf])|(?<=\xe3\x82[\x80-\x96\xa1-\xbf])|(?<=\xe3\x83[\x80-\xba])"
)
_PUNCTUATION = rb"[!-/:-@\[-`{-~]|\xe3\x80[\x81\x82]|\xef\xbc[\x81\x8c\x9a\x9b\x9f]"
_CUT = re.compile(
    rb"(?:%b)(?=[ \t\r\n])|(?:%b)(?=%b)|(?<=[ \t\r\n])(?=[ \t\r\n][\x21-\x7e\xc3-\xdf\xe4-\xf4])"
    % (_VISIBLE, _LETTER, _PUNCTUATION)
)


def last_cut(text: bytes) -> int:
    """The last byte offset at which UTF-8 `text` can be cut without changing GPT-2's tokens, in any
    context; 0 if there is none."""
    start = len(text)
    while start:
        end, start = start, max(0, 2 * start - len(text) - _WINDOW)
        found = 0
        for match in _CUT.finditer(text, start, min(len(text), end + 4)):
            found = match.start()
        if found:
            return found
    return 0


def first_cut(text: bytes, start: int) -> int:
    """The first safe cut at or after `start`; the end of `text` if there is none."""
    match = _CUT.search(text, start)
    return match.start() if match else len(text)


def character(text: bytes | bytearray, end: int) -> int:
    """The first byte of the UTF-8 character that contains byte `end`; at most the text's length."""
    if end >= len(text):
        return len(text)
    while end and text[end] & 0xC0 == 0x80:
        end -= 1
    return end

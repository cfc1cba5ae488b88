"""Stop strings: a row ends as soon as its new text contains one of them."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf


class StopStrings:
    """Looks for stop strings while tokens arrive.

    Args:
        bytes_of: int32[rows] -> string[rows], the bytes each token adds to the text.
        stops: string[n], UTF-8; empty strings are ignored. n may be 0: then nothing is ever looked for.
    """

    def __init__(self, bytes_of: Callable[[tf.Tensor], tf.Tensor], stops: tf.Tensor):
        self._bytes_of = bytes_of
        stops = tf.boolean_mask(stops, tf.strings.length(stops) > 0)
        self._any = tf.size(stops) > 0
        # Quoted for RE2, whose own quote mark \E must not end the quotation. \C is one byte, valid UTF-8 or not.
        quoted = tf.strings.join(["\\Q", tf.strings.regex_replace(stops, r"\\E", r"\\E\\\\E\\Q"), "\\E"])
        self._either = tf.strings.join(["(?:", tf.strings.reduce_join(quoted, separator="|"), ")"])
        self._longest = tf.reduce_max(tf.concat([tf.strings.length(stops), [1]], 0))

    def found(self, tails: tf.Tensor, tokens: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Appends the tokens' bytes. tails string[rows], tokens int32[rows] -> (bool[rows], the new tails)."""

        def look():
            text = tf.strings.join([tails, self._bytes_of(tokens)])
            hits = tf.raw_ops.RegexFullMatch(input=text, pattern=tf.strings.join(["\\C*", self._either, "\\C*"]))
            length = tf.strings.length(text)
            kept = tf.minimum(length, self._longest - 1)
            return hits, tf.strings.substr(text, length - kept, kept)

        return tf.cond(self._any, look, lambda: (tf.zeros(tf.shape(tokens), tf.bool), tails))

    def cut(self, texts: tf.Tensor) -> tf.Tensor:
        """The texts up to the first stop string. string[rows] -> string[rows]."""

        def cut():
            pattern = tf.strings.join([self._either, "\\C*"])
            return tf.raw_ops.RegexReplace(input=texts, pattern=pattern, rewrite="", replace_global=False)

        return tf.cond(self._any, cut, lambda: texts)

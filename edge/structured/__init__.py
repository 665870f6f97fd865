"""Answers that fit a JSON schema, a regular expression or the format of tool calls.

A grammar is written in llguidance's Lark dialect, compiled once per model, and followed token by
token as a `sampling.Constraint`. Only `bridge` and `grammars` import llguidance.
"""

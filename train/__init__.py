"""Trainers for Kandinsky 5: one loop, with what is minimised and what moves as values.

Installed as `kandinsky5_train`; in the source tree it is `train`, and it imports itself relatively.
"""

"""The Triton form: one launch per group of hook points, a program per token, static tables.

A program first looks up whether its token has anything to do in this group, and leaves at once if
not: two loads for an unsteered token. Otherwise it runs through the hook points of the group, the
gates and blocks of its own plan alone, with the row of the stream in registers. So the cost of a
token is that of its own edits, whatever the number of plans around it.

The form follows `steer.batch.step.Step` and `steer.edits`; dot products, norms and sums are
float32, and the row is cast once per hook point. Launches are captured by CUDA graphs: they read
and write static buffers alone, and depend on no data in Python.

To read it: `launch.edit_group` launches `group.edit_tokens`, which takes its token through
`point.at_point` for each hook point, and there through `gates.decide` and `blocks.after_block`.

Importing these modules needs Triton; nothing else in the library does.
"""

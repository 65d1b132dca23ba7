"""What plug-ins of servers share: which rows of a batch and which layers pbsattn takes, by what settings. Knows no server.

For pbsattn-vllm and pbsattn-sglang, which go with the pbsattn of their own version: names here may change with any version.
"""

"""Event files of TensorBoard, read without it."""

import collections
import struct


def scalars(folder):
    """What the event files of a folder hold: name -> step -> value; a later file wins."""
    from tensorboardX.proto.event_pb2 import Event

    found = collections.defaultdict(dict)
    for file in sorted(folder.glob("events.*")):
        content = file.read_bytes()
        while content:  # size, checksum, event, checksum
            (size,) = struct.unpack_from("<Q", content)
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                found[value.tag][event.step] = value.simple_value
            content = content[16 + size :]
    return dict(found)

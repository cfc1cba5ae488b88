"""Small protobuf messages declared in Python: the few fields we need of TF Serving's, without its package."""

from collections.abc import Mapping, Sequence

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# a field: (name, number, type, repeated); type is a scalar's name ("string", "int64", …) or another message's.
Field = tuple[str, int, str, bool]


def declare(package: str, messages: Mapping[str, Sequence[Field]]) -> dict[str, type]:
    """Message classes by name, in a descriptor pool of their own (so that the real ones may be loaded beside them).

    A map field is declared as a repeated message with `key` and `value`: the same on the wire and in text.
    """
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for message, fields in messages.items():
        declared = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = declared.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind in messages:
                field.type, field.type_name = field.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                field.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in messages}

#pragma once
// Requests are taken from the wire by hand (raw methods), because gRPC answers a message that it
// cannot parse with UNIMPLEMENTED and no text. Here the caller is told which field is not UTF-8.

#include <grpcpp/support/byte_buffer.h>

#include "absl/status/status.h"

namespace google::protobuf {
class Message;
}

namespace godwit {

// INVALID_ARGUMENT with a BadRequest violation when `bytes` is not a message of this type. Leaves
// `bytes` as it was.
absl::Status ParseRequest(const grpc::ByteBuffer& bytes, google::protobuf::Message* request);

grpc::ByteBuffer SerializeAnswer(const google::protobuf::Message& answer);

}  // namespace godwit

// `godwit sessions`: what a server keeps, from the command line.

#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/client.h"
#include "cli/command.h"
#include "godwit/v1/sessions.grpc.pb.h"

namespace godwit::cli {
namespace {

constexpr size_t kChunkBytes = 1 << 20;

struct SessionFlags {
  ClientFlags client;
  std::string id, name, file;
  std::optional<int64_t> ttl_ms;
};

using Stub = v1::Sessions::Stub;
using Call = std::function<grpc::Status(Stub&, grpc::ClientContext&, const SessionFlags&)>;

void Print(const v1::Session& session) {
  const char* const where[] = {"empty", "memory", "disk"};
  std::cout << absl::StrFormat(
      "%s  %d tokens  %s%s  idle %.1f s of %.0f s\n", session.session_id(),
      session.state_position(), where[session.location() % 3], session.busy() ? ", busy" : "",
      static_cast<double>(session.idle_ms()) * 1e-3, static_cast<double>(session.ttl_ms()) * 1e-3);
}

void Print(const v1::Snapshot& snapshot) {
  std::cout << absl::StrFormat("%s  %.1f MiB\n", snapshot.name(),
                               static_cast<double>(snapshot.num_bytes()) / (1 << 20));
}

// One answer, printed if the call went well.
grpc::Status Printed(const grpc::Status& status, const v1::Snapshot& snapshot) {
  if (status.ok()) Print(snapshot);
  return status;
}

// Of a new session its id alone, for scripts.
grpc::Status PrintedId(const grpc::Status& status, const v1::Session& session) {
  if (status.ok()) std::cout << session.session_id() << "\n";
  return status;
}

grpc::Status Create(Stub& stub, grpc::ClientContext& context, const SessionFlags& flags) {
  v1::CreateSessionRequest request;
  if (flags.ttl_ms) request.set_ttl_ms(*flags.ttl_ms);
  v1::Session session;
  return PrintedId(stub.CreateSession(&context, request, &session), session);
}

grpc::Status List(Stub& stub, grpc::ClientContext& context, const SessionFlags&) {
  v1::ListSessionsResponse answer;
  const grpc::Status status = stub.ListSessions(&context, {}, &answer);
  for (const v1::Session& session : answer.sessions()) Print(session);
  return status;
}

grpc::Status Delete(Stub& stub, grpc::ClientContext& context, const SessionFlags& flags) {
  v1::DeleteSessionRequest request;
  request.set_session_id(flags.id);
  v1::DeleteSessionResponse answer;
  return stub.DeleteSession(&context, request, &answer);
}

grpc::Status Fork(Stub& stub, grpc::ClientContext& context, const SessionFlags& flags) {
  v1::ForkSessionRequest request;
  request.set_session_id(flags.id);
  v1::Session session;
  return PrintedId(stub.ForkSession(&context, request, &session), session);
}

grpc::Status Save(Stub& stub, grpc::ClientContext& context, const SessionFlags& flags) {
  v1::SnapshotSessionRequest request;
  request.set_session_id(flags.id);
  request.set_name(flags.name);
  v1::Snapshot snapshot;
  return Printed(stub.SnapshotSession(&context, request, &snapshot), snapshot);
}

grpc::Status Restore(Stub& stub, grpc::ClientContext& context, const SessionFlags& flags) {
  v1::RestoreSessionRequest request;
  request.set_name(flags.name);
  v1::Session session;
  return PrintedId(stub.RestoreSession(&context, request, &session), session);
}

grpc::Status ListSnapshots(Stub& stub, grpc::ClientContext& context, const SessionFlags&) {
  v1::ListSnapshotsResponse answer;
  const grpc::Status status = stub.ListSnapshots(&context, {}, &answer);
  for (const v1::Snapshot& snapshot : answer.snapshots()) Print(snapshot);
  return status;
}

grpc::Status DeleteSnapshot(Stub& stub, grpc::ClientContext& context, const SessionFlags& flags) {
  v1::DeleteSnapshotRequest request;
  request.set_name(flags.name);
  v1::DeleteSnapshotResponse answer;
  return stub.DeleteSnapshot(&context, request, &answer);
}

grpc::Status Export(Stub& stub, grpc::ClientContext& context, const SessionFlags& flags) {
  std::ofstream file;
  v1::ExportSnapshotRequest request;
  request.set_name(flags.name);
  const auto reader = stub.ExportSnapshot(&context, request);
  for (v1::SnapshotChunk chunk; reader->Read(&chunk);) {
    // Not before: a wrong name leaves no empty file, and overwrites none.
    if (!file.is_open()) file.open(flags.file, std::ios::binary);
    file.write(chunk.data().data(), std::ssize(chunk.data()));
  }
  const grpc::Status status = reader->Finish();
  file.close();
  if (status.ok() && !file) {
    return {grpc::StatusCode::INTERNAL, absl::StrCat("cannot write ", flags.file)};
  }
  return status;
}

grpc::Status Import(Stub& stub, grpc::ClientContext& context, const SessionFlags& flags) {
  std::ifstream file(flags.file, std::ios::binary);
  if (!file) return {grpc::StatusCode::NOT_FOUND, absl::StrCat("cannot read ", flags.file)};
  v1::Snapshot snapshot;
  const auto writer = stub.ImportSnapshot(&context, &snapshot);
  v1::ImportSnapshotRequest request;
  request.set_name(flags.name);
  std::string chunk(kChunkBytes, '\0');
  bool accepted = true;
  while (accepted && (file.read(chunk.data(), std::ssize(chunk)), file.gcount() > 0)) {
    request.set_data(chunk.data(), static_cast<size_t>(file.gcount()));
    accepted = writer->Write(request);
    request.clear_name();
  }
  writer->WritesDone();
  return Printed(writer->Finish(), snapshot);
}

int Run(const SessionFlags& flags, const Call& call) {
  absl::StatusOr<Client> client = Connect(flags.client);
  if (!client.ok()) return Report(client.status(), kUsage);
  grpc::ClientContext context;
  client->Prepare(context);
  const auto stub = v1::Sessions::NewStub(client->channel);
  const grpc::Status status = call(*stub, context, flags);
  if (status.ok()) return kDone;
  std::cerr << "godwit: " << Describe(status) << "\n";
  return kFailed;
}

}  // namespace

void AddSessionsCommand(CLI::App& app, int& exit_code) {
  CLI::App* sessions =
      app.add_subcommand("sessions", "Sessions and snapshots of a server")->require_subcommand(1);
  const auto add = [&](const char* name, const char* help, bool takes_id, bool takes_name,
                       bool takes_file, Call call) {
    auto flags = std::make_shared<SessionFlags>();
    CLI::App* command = sessions->add_subcommand(name, help);
    AddClientFlags(*command, flags->client);
    if (takes_id) command->add_option("session", flags->id, "session id")->required();
    if (takes_name) command->add_option("name", flags->name, "name of the snapshot")->required();
    if (takes_file) command->add_option("file", flags->file, "safetensors file")->required();
    if (std::string(name) == "create") {
      command->add_option("--ttl-ms", flags->ttl_ms, "deleted when idle for so long");
    }
    command->callback([flags, call, &exit_code] { exit_code = Run(*flags, call); });
  };
  add("create", "An empty session; prints its id", false, false, false, Create);
  add("list", "All of this token's sessions", false, false, false, List);
  add("delete", "Delete a session", true, false, false, Delete);
  add("fork", "A second session with the same state; prints its id", true, false, false, Fork);
  add("snapshot", "Write a session's state to the server's disk", true, true, false, Save);
  add("restore", "A new session with a snapshot's state; prints its id", false, true, false,
      Restore);
  add("snapshots", "All of this token's snapshots", false, false, false, ListSnapshots);
  add("delete-snapshot", "Delete a snapshot", false, true, false, DeleteSnapshot);
  add("export", "Fetch a snapshot into a file", false, true, true, Export);
  add("import", "Send a file to be a snapshot", false, true, true, Import);
}

}  // namespace godwit::cli

#pragma once
// Certificates made on the spot, so that no key lies in the repository and none expires.

#include <string>

namespace godwit {

struct TestKeyPair {
  std::string certificate, key;  // PEM
};

// Signed by itself.
TestKeyPair MakeAuthority(const std::string& name);
// For "localhost" and 127.0.0.1, signed by `authority`.
TestKeyPair MakeCertificate(const std::string& name, const TestKeyPair& authority);

// A file that goes away with the object.
class TestFile {
 public:
  explicit TestFile(const std::string& text);
  ~TestFile();
  TestFile(const TestFile&) = delete;
  TestFile& operator=(const TestFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace godwit

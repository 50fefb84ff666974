#include "server/prefix_domain.h"

#include <openssl/evp.h>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace godwit {

std::string PrefixDomain(std::string_view model, const RopeRegime& regime, std::string_view tenant,
                         std::string_view salt) {
  const std::string rope = regime.ToString();
  std::string bytes = "godwit prefix cache v1";
  for (const std::string_view part : {model, std::string_view(rope), tenant, salt}) {
    absl::StrAppend(&bytes, "\n", part.size(), ":");
    bytes.append(part);
  }
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  GODWIT_CHECK(EVP_Digest(bytes.data(), bytes.size(), digest, &size, EVP_sha256(), nullptr) == 1);
  return std::string(reinterpret_cast<const char*>(digest), size);
}

}  // namespace godwit

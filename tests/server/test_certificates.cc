#include "tests/server/test_certificates.h"

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>

#include "kernels/base/check.h"

namespace godwit {
namespace {

using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using Certificate = std::unique_ptr<X509, decltype(&X509_free)>;
using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;

std::string TextOf(BIO* bio) {
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio, &data);
  return std::string(data, static_cast<size_t>(size));
}

std::string ToPem(EVP_PKEY* key) {
  const Bio bio(BIO_new(BIO_s_mem()), BIO_free);
  GODWIT_CHECK(PEM_write_bio_PrivateKey(bio.get(), key, nullptr, nullptr, 0, nullptr, nullptr) ==
               1);
  return TextOf(bio.get());
}

std::string ToPem(X509* certificate) {
  const Bio bio(BIO_new(BIO_s_mem()), BIO_free);
  GODWIT_CHECK(PEM_write_bio_X509(bio.get(), certificate) == 1);
  return TextOf(bio.get());
}

void AddExtension(X509* certificate, int nid, const char* value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, certificate, certificate, nullptr, nullptr, 0);
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value);
  GODWIT_CHECK(extension != nullptr);
  X509_add_ext(certificate, extension, -1);
  X509_EXTENSION_free(extension);
}

Certificate NewCertificate(const std::string& name, EVP_PKEY* key) {
  static long serial = 1;
  Certificate certificate(X509_new(), X509_free);
  X509_set_version(certificate.get(), 2);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate.get()), ++serial);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), -3600);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), 3600);
  X509_set_pubkey(certificate.get(), key);
  X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate.get()), "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  return certificate;
}

}  // namespace

TestKeyPair MakeAuthority(const std::string& name) {
  const Key key(EVP_EC_gen("P-256"), EVP_PKEY_free);
  const Certificate certificate = NewCertificate(name, key.get());
  X509_set_issuer_name(certificate.get(), X509_get_subject_name(certificate.get()));
  AddExtension(certificate.get(), NID_basic_constraints, "critical,CA:TRUE");
  GODWIT_CHECK(X509_sign(certificate.get(), key.get(), EVP_sha256()) > 0);
  return {ToPem(certificate.get()), ToPem(key.get())};
}

TestKeyPair MakeCertificate(const std::string& name, const TestKeyPair& authority) {
  const Bio issuer_bio(
      BIO_new_mem_buf(authority.certificate.data(), static_cast<int>(authority.certificate.size())),
      BIO_free);
  const Bio key_bio(BIO_new_mem_buf(authority.key.data(), static_cast<int>(authority.key.size())),
                    BIO_free);
  const Certificate issuer(PEM_read_bio_X509(issuer_bio.get(), nullptr, nullptr, nullptr),
                           X509_free);
  const Key issuer_key(PEM_read_bio_PrivateKey(key_bio.get(), nullptr, nullptr, nullptr),
                       EVP_PKEY_free);
  const Key key(EVP_EC_gen("P-256"), EVP_PKEY_free);
  const Certificate certificate = NewCertificate(name, key.get());
  X509_set_issuer_name(certificate.get(), X509_get_subject_name(issuer.get()));
  AddExtension(certificate.get(), NID_subject_alt_name, "DNS:localhost,IP:127.0.0.1");
  GODWIT_CHECK(X509_sign(certificate.get(), issuer_key.get(), EVP_sha256()) > 0);
  return {ToPem(certificate.get()), ToPem(key.get())};
}

TestFile::TestFile(const std::string& text) {
  path_ = (std::filesystem::temp_directory_path() / "godwit_test_XXXXXX").string();
  const int file = mkstemp(path_.data());
  GODWIT_CHECK(file >= 0);
  GODWIT_CHECK(write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  close(file);
}

TestFile::~TestFile() { std::filesystem::remove(path_); }

}  // namespace godwit
